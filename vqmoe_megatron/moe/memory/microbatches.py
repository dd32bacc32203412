"""Which microbatch a layer is working on: the latest, or, recomputed, an earlier one.

Pipeline schedules run several forward passes before the first backward pass, and activation
recompute evaluates a layer again within it. So a chunk's output, where its backward pass begins,
carries what was made for its microbatch.
"""

from __future__ import annotations

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

    def begin(self, made: Made) -> None:
        """A forward pass starts, or, in a backward pass, a whole model's is run again."""
        if is_in_backward():
            self._differentiated = made
        else:
            self._latest = made

    def follow(self, output: torch.Tensor) -> None:
        """``output`` is the chunk's of the current forward pass; its backward pass starts there."""
        made = self.current
        if torch.is_grad_enabled() and output.requires_grad and made is not None:
            output.register_hook(lambda _: self._begin_backward(made))

    def _begin_backward(self, made: Made) -> None:
        self._differentiated = made

    def clear(self) -> None:
        """The step is over: nothing of it is held any longer."""
        self._latest = self._differentiated = None

    @property
    def current(self) -> Made | None:
        """Of the forward pass that is running, or is being recomputed."""
        return self._differentiated if is_in_backward() else self._latest
