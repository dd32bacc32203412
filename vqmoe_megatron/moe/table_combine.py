"""The dual path's output straight from the table: gather, scale, add, and every gradient.

T tokens, H hidden size, C codes per token, R rows of the table.

    y[t] = p_continuous[t] * y_continuous[t] + p_discrete[t] * scale * sum_c table[ids[t, c]]

The discrete output of a token is never stored: ids and weights are enough to read it again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vqmoe_megatron.moe.straight_through import spent_gradient
from vqmoe_megatron.vq.combine import gather_scale_add, gather_scale_add_backward
from vqmoe_megatron.vq.segment_sum import segment_sum


class _CombineWithTable(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: ANN205
        ctx,  # noqa: ANN001
        y_continuous: torch.Tensor,
        p_continuous: torch.Tensor | None,
        p_discrete: torch.Tensor,
        table: torch.Tensor,
        x: torch.Tensor,
        ids: torch.Tensor,
        scale: float,
        gradient: Callable[[torch.Tensor], torch.Tensor] | None,
    ):
        ctx.save_for_backward(y_continuous, p_continuous, p_discrete, table, ids)
        ctx.scale, ctx.gradient = scale, gradient
        return gather_scale_add(
            table, ids, scale, y_continuous, p_continuous, p_discrete, y_continuous.dtype
        )

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        y_continuous, p_continuous, p_discrete, table, ids = ctx.saved_tensors
        dy, dp_continuous, dp_discrete = gather_scale_add_backward(
            grad, table, ids, ctx.scale, y_continuous, p_continuous, p_discrete
        )
        at_discrete = grad * p_discrete.unsqueeze(1)
        dx = None
        if ctx.gradient is not None and ctx.needs_input_grad[4]:
            gradient, ctx.gradient = ctx.gradient, spent_gradient  # it holds the table
            dx = gradient(at_discrete.to(grad.dtype))
        dtable = segment_sum(at_discrete, ids[:, 0], table.shape[0])
        for c in range(1, ids.shape[1]):
            dtable += segment_sum(at_discrete, ids[:, c], table.shape[0])
        return dy, dp_continuous, dp_discrete, dtable.mul_(ctx.scale), dx, None, None, None


def combine_with_table(
    y_continuous: torch.Tensor,
    weights: tuple[torch.Tensor | None, torch.Tensor],
    table: torch.Tensor,
    ids: torch.Tensor,
    scale: float,
    x: torch.Tensor,
    gradient: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """Return the weighted sum of both paths' outputs.

    Args:
        y_continuous: ``[T, H]``.
        weights: ``p_continuous [T]`` (None: one) and ``p_discrete [T]``.
        table: ``[R, H]``; its gradient is summed in fp32 (fp64).
        ids: int64 ``[T, C]``.
        scale: one number.
        x: the tokens that the straight-through gradient goes to.
        gradient: from the gradient of the discrete output ``[T, H]`` to that of ``x``; None: none.

    Returns:
        ``[T, H]`` in the dtype of ``y_continuous``. Communicates in the backward pass only, where
        ``gradient`` does.
    """
    return _CombineWithTable.apply(y_continuous, *weights, table, x, ids, scale, gradient)
