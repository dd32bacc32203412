"""What an execution of the discrete path is: what it asks the experts for, and what it answers.

T tokens, C codes per token, H hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from vqmoe_megatron.moe.expert_engine import Result, Work
from vqmoe_megatron.moe.part import Part

Answer = Callable[[Result], Part]


class Execution(ABC):
    """One way to evaluate a discrete path; the others must give the same output and gradients."""

    keeps_table = False  # whether something lives until the end of the optimizer's step

    @abstractmethod
    def ask(self, x: torch.Tensor, request: Any) -> tuple[Work, Answer]:
        """Return what the experts are asked for, and what becomes of their answer.

        Args:
            x: ``[T, H]`` tokens.
            request: what they read: their codes (``Assignment``), or for fill a ``Fill``.
        """

    def finish_table(self) -> None:
        """Bring a kept table's gradient to the weights."""

    def refuse_unfinished(self) -> None:
        """Raise ``ValueError`` where the optimizer would step without that gradient."""

    def enter(self, is_training: bool, was_training: bool) -> None:
        """The layer turns to training or evaluation, or is told so again."""

    def clear(self) -> None:
        """Forget what was kept."""
