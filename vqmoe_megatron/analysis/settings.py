"""The protocol of an analysis: how much is read, disturbed and trained, by which draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Settings:
    """The protocol; every number of it stands on the page."""

    num_tokens: int = 8192  # read in each pass
    seed: int = 1234  # of noise, corruption, shuffles, probes
    split: str = "valid"
    noise_sizes: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0, 2.0)
    corruption_rates: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.4)
    num_probes: int = 2  # of gradients, for each token of one microbatch
    adapt_batches: int = 8
    adapt_lr: float = 1e-3
    drift_steps: int = 12
    tags: Path | None = None

    def generator(self, purpose: str) -> torch.Generator:
        """Draws for one purpose, the same for every model."""
        number = int.from_bytes(purpose.encode()[:6].ljust(6, b"\0"), "big")
        return torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
