"""Which microbatch a layer is working on: the latest, or, recomputed, an earlier one.

Pipeline schedules run several forward passes before the first backward pass, and activation
recompute evaluates a layer again within it. Backward passes of a model chunk come in the order of
its forward passes, so what was made for a microbatch waits in a queue until its own begins.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import torch

Made = TypeVar("Made")


def is_in_backward() -> bool:
    """Whether the caller runs inside a backward pass, as recomputed forward passes do."""
    return torch._C._current_graph_task_id() != -1


class Microbatches(Generic[Made]):
    """What was made for each microbatch under way, of one model chunk."""

    def __init__(self) -> None:
        self._latest: Made | None = None
        self._differentiated: Made | None = None
        self._waiting: deque[Made] = deque()

    def begin(self, made: Made) -> None:
        """A forward pass starts."""
        self._latest = made

    def follow(self, output: torch.Tensor) -> None:
        """``output`` is the chunk's of the latest forward pass; its backward pass starts there.

        An evaluation has none, though a pipeline stage's output asks for gradients even then.
        """
        if torch.is_grad_enabled() and output.requires_grad and self._latest is not None:
            self._waiting.append(self._latest)
            output.register_hook(self._begin_backward)

    def _begin_backward(self, _: torch.Tensor) -> None:
        self._differentiated = self._waiting.popleft() if self._waiting else None

    def clear(self) -> None:
        """The step is over: forward passes without a backward pass are forgotten."""
        self._waiting.clear()
        self._latest = self._differentiated = None

    @property
    def current(self) -> Made | None:
        """Of the forward pass that is running, or is being recomputed."""
        return self._differentiated if is_in_backward() else self._latest
