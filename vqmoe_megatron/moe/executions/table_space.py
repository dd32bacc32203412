"""A table that is made of weights and codes alone: what may be kept for a step or built ahead.

T tokens, H hidden size.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from vqmoe_megatron.moe.executions.execution import Execution
from vqmoe_megatron.moe.part import Part


@dataclass(frozen=True)
class Table:
    """All rows' outputs, the same on all ranks."""

    values: torch.Tensor  # fp32 (fp64), rows of H, what tokens read


class TableSpace(Execution):
    """One layer's table: how it is built and read. ``request`` is what :meth:`ask` was told."""

    @property
    @abstractmethod
    def is_training(self) -> bool:
        """Whether the layer trains."""

    @abstractmethod
    def weights(self) -> list[torch.Tensor]:
        """Everything that the table is made of."""

    @abstractmethod
    def evaluate(self, dtype: torch.dtype) -> Table:
        """Build the table by itself; the experts run in ``dtype``."""

    @abstractmethod
    def read(self, table: Any, request: Any, dtype: torch.dtype) -> Part:
        """What tokens read, ``[T, H]`` in ``dtype``."""
