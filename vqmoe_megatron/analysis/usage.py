"""How evenly experts and codes are used.

T tokens, k choices per token, n experts or codes of one slice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Usage:
    """What counts over n experts, or codes of one slice, say."""

    num_chosen: int  # n
    perplexity: float  # exp(entropy) of the shares: n when uniform, 1 when all choose the same
    num_dead: int  # chosen by no token
    imbalance: float  # largest share in units of 1 / n: 1 when uniform, n when collapsed


def choice_counts(ids: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Count how often each id was chosen.

    Args:
        ids: int64, of any shape, in ``[0, num_ids)``.
        num_ids: n.

    Returns:
        fp64 ``[n]``.

    Raises:
        ValueError: for an id outside.
    """
    flat = ids.reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < num_ids:
        raise ValueError(
            f"choices lie in {int(flat.min())}..{int(flat.max())}, outside of 0..{num_ids - 1}"
        )
    return torch.bincount(flat, minlength=num_ids).double()


def entropy(counts: torch.Tensor) -> float:
    """Return the entropy in nats of what was counted; 0 for no count at all."""
    counts = counts.double().reshape(-1)
    share = counts[counts > 0] / counts.sum().clamp(min=1.0)
    return float(-(share * share.log()).sum())


def usage_of(counts: torch.Tensor) -> Usage:
    """Describe counts ``[n]``.

    Raises:
        ValueError: where nothing was counted.
    """
    counts = counts.double()
    if not counts.numel() or not float(counts.sum()):
        raise ValueError("no token was counted, so nothing can be said of usage")
    num_ids = counts.numel()
    return Usage(
        num_chosen=num_ids,
        perplexity=float(torch.tensor(entropy(counts), dtype=torch.float64).exp()),
        num_dead=int((counts == 0).sum()),
        imbalance=float(counts.max() / counts.sum() * num_ids),
    )
