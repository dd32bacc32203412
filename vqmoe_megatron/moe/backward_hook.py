"""Run something exactly once per trained microbatch."""

from __future__ import annotations

from collections.abc import Callable

import torch


class _RunInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, action: Callable[[], None]):  # noqa: ANN001, ANN205
        ctx.action = action
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        ctx.action()
        ctx.action = None
        return grad, None


def run_in_backward(tensor: torch.Tensor, action: Callable[[], None]) -> torch.Tensor:
    """Return ``tensor``; call ``action`` when its gradient passes.

    Evaluation has no backward pass, and activation recompute builds a second graph of which only
    the last is differentiated, so statistics gathered here are never counted twice.
    """
    return _RunInBackward.apply(tensor, action)
