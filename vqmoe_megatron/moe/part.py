"""What a path makes of the experts' outputs: its part of the layer's output.

T tokens, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


class Part(ABC):
    """A path's output, dense or still in a table that is read while it is added."""

    @abstractmethod
    def value(self) -> torch.Tensor:
        """``[T, H]`` by itself."""

    @abstractmethod
    def added_to(
        self, first: torch.Tensor, p_first: torch.Tensor | None, p: torch.Tensor
    ) -> torch.Tensor:
        """``p_first * first + p * self`` as ``[T, H]`` in the dtype of ``first``.

        ``first`` is ``[T, H]``; ``p_first`` (None: one) and ``p`` are ``[T]``.
        """


@dataclass(frozen=True)
class DensePart(Part):
    """An output that is there."""

    y: torch.Tensor  # [T, H]

    def value(self) -> torch.Tensor:
        """Return it."""
        return self.y

    def added_to(
        self, first: torch.Tensor, p_first: torch.Tensor | None, p: torch.Tensor
    ) -> torch.Tensor:
        """Add in the dtype of the weights. No communication."""
        weighted = first if p_first is None else p_first.unsqueeze(1) * first
        return (weighted + p.unsqueeze(1) * self.y).to(first.dtype)


def sum_slots(rows: torch.Tensor) -> torch.Tensor:
    """``[T, k, H]`` -> ``[T, H]``; one slot needs no sum."""
    return rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(dim=1)
