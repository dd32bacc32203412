"""The two collectives of the code table, each with its gradient.

S slots of a rank, P expert-parallel ranks, E expert-tensor ranks, H width.

    sum_over_shards   [S, H] -> [S, H]       partial outputs of the E shards, summed on all of them
    gather_table      [S, H] -> [P * S, H]   every rank gets all rows, in fp32

Gradients of table rows are sums over many tokens: they are reduced in fp32 whatever the model's
dtype. All shapes are equal on all ranks.
"""

from __future__ import annotations

import torch


class _SumOverShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, group):  # noqa: ANN001, ANN205
        ctx.group = group
        rows = rows.clone()
        torch.distributed.all_reduce(rows, group=group)
        return rows

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        grad = grad.contiguous().clone()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_shards(rows: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Sum ``[S, H]`` over ``group``; the gradient, of all ranks' tokens, is summed likewise.

    Communicates over ``group`` one all-reduce each way (none for one rank).
    """
    return rows if group.size() == 1 else _SumOverShards.apply(rows, group)


class _GatherTable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, group):  # noqa: ANN001, ANN205
        ctx.group, ctx.num_local = group, rows.shape[0]
        table = rows.new_empty(group.size() * rows.shape[0], rows.shape[1])
        torch.distributed.all_gather_into_tensor(table, rows.contiguous(), group=group)
        return table if table.dtype == torch.float64 else table.float()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        own = grad.new_empty(ctx.num_local, grad.shape[1])
        torch.distributed.reduce_scatter_tensor(own, grad.contiguous(), group=ctx.group)
        return own, None


def gather_table(rows: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Concatenate ``[S, H]`` of all ranks of ``group`` to ``[P * S, H]``, fp32 (fp64 for fp64).

    Communicates over ``group`` one all-gather in the dtype of ``rows``, in the backward pass one
    reduce-scatter in fp32 (none for one rank).
    """
    if group.size() > 1:
        return _GatherTable.apply(rows, group)
    return rows if rows.dtype == torch.float64 else rows.float()
