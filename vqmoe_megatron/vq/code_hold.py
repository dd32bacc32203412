"""Trained codes that stay where they are, whatever an optimizer does with them.

C code slices, K codes per slice, D slice width. Adam moves a parameter without a gradient as long
as it remembers earlier ones, so codes are put back behind its step. The step's end, which comes
before, says whether they are frozen; that is known on the device alone, and nothing here asks.
"""

from __future__ import annotations

import torch


class CodeHold(torch.nn.Module):
    """The codes as the step's end left them, and whether they have to stay."""

    kept: torch.Tensor  # fp32 [C, K, D]
    is_frozen: torch.Tensor  # bool scalar

    def __init__(self, codes: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", torch.zeros_like(codes), persistent=False)
        self.register_buffer("is_frozen", torch.tensor(False), persistent=False)

    def take(self, codes: torch.Tensor, is_frozen: torch.Tensor) -> None:
        """Remember ``codes`` as they are before the optimizer's step."""
        self.kept.copy_(codes)
        self.is_frozen.copy_(is_frozen)

    def put_back(self, codes: torch.Tensor) -> None:
        """Undo what the optimizer did to frozen ``codes``, in place."""
        codes.copy_(torch.where(self.is_frozen, self.kept, codes))

    def forget(self) -> None:
        """Hold nothing: the codes are others now."""
        self.is_frozen.fill_(False)
