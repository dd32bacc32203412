"""Rows of an expert-tensor group: gathered before its sharded experts, summed and returned after.

E ranks of the group, R_e rows of rank e, R = sum of R_e, H hidden size.

    gather_rows          [R_e, H] -> [R, H]   every rank gets all rows, in rank order
    reduce_scatter_rows  [R, H] -> [R_e, H]   partial results are summed, every rank keeps its own

Each is the other's gradient. All ranks know all sizes, which may differ and be zero. The
collectives move equal blocks of the largest size, because gloo has no others, and NCCL would turn
unequal ones into one broadcast or reduction per rank. When all are empty nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def gather_rows(
    rows: torch.Tensor, sizes: Sequence[int], group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Concatenate the rows of all ranks of ``group``, in rank order.

    Args:
        rows: ``[R_e, H]``, this rank's.
        sizes: R_e of every rank, equal on all of them.
        group: the E ranks.

    Returns:
        ``[R, H]``. The gradient of a row is the sum of what all ranks return for it.

    Communicates over ``group``: one all-gather, in the backward pass one reduce-scatter.
    """
    return _Gather.apply(rows, sizes, group)


def reduce_scatter_rows(
    partial: torch.Tensor, sizes: Sequence[int], group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Sum all ranks' partial results and keep those of this rank's rows.

    Args:
        partial: ``[R, H]``, this rank's part of every row's result, ordered by rank.
        sizes: R_e of every rank, equal on all of them.
        group: the E ranks.

    Returns:
        ``[R_e, H]``.

    Communicates over ``group``: one reduce-scatter, in the backward pass one all-gather.
    """
    return _ReduceScatter.apply(partial, sizes, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: torch.Tensor, sizes: Sequence[int], group):  # noqa: ANN001, ANN205
        ctx.sizes, ctx.group = sizes, group
        return _all_gather(rows, sizes, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        return _sum_and_scatter(grad, ctx.sizes, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, partial: torch.Tensor, sizes: Sequence[int], group):  # noqa: ANN001, ANN205
        ctx.sizes, ctx.group = sizes, group
        return _sum_and_scatter(partial, sizes, group)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        return _all_gather(grad, ctx.sizes, ctx.group), None, None


def _all_gather(
    rows: torch.Tensor, sizes: Sequence[int], group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    largest, total = max(sizes), sum(sizes)
    if total == 0:
        return rows.new_empty(0, rows.shape[1])
    if rows.shape[0] < largest:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, largest - rows.shape[0]))
    gathered = rows.new_empty(len(sizes) * largest, rows.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, rows.contiguous(), group=group)
    if total == gathered.shape[0]:
        return gathered
    blocks = gathered.split(largest)
    return torch.cat([block[:size] for block, size in zip(blocks, sizes, strict=True)])


def _sum_and_scatter(
    partial: torch.Tensor, sizes: Sequence[int], group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    largest, total = max(sizes), sum(sizes)
    if total == 0:
        return partial.new_empty(0, partial.shape[1])
    if total == len(sizes) * largest:
        blocks = partial.contiguous()
    else:
        blocks = partial.new_zeros(len(sizes) * largest, partial.shape[1])
        parts = zip(blocks.split(largest), partial.split(list(sizes)), sizes, strict=True)
        for block, part, size in parts:
            block[:size] = part
    own = partial.new_empty(largest, partial.shape[1])
    torch.distributed.reduce_scatter_tensor(own, blocks, group=group)
    return own[: sizes[group.rank()]]
