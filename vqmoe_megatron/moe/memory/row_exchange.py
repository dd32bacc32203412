"""Rows on their way from their owners to the tokens that read them, and their gradients home.

S own rows, U distinct rows that this rank's tokens read, W ranks that share rows, H width.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.moe.memory.row_plan import RowPlan
from vqmoe_megatron.moe.table_exchange import gather_table
from vqmoe_megatron.vq.segment_sum import segment_sum, sum_looked_up_rows


class _SendRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: torch.Tensor, plan: RowPlan, group):  # noqa: ANN001, ANN205
        ctx.plan, ctx.group, ctx.num_own, ctx.dtype = plan, group, values.shape[0], values.dtype
        rows = values.new_empty(plan.num_wanted, values.shape[1])
        torch.distributed.all_to_all_single(
            rows,
            values.index_select(0, plan.asked),
            list(plan.wanted_splits),
            list(plan.asked_splits),
            group=group,
        )
        return rows if rows.dtype == torch.float64 else rows.float()

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        plan = ctx.plan
        home = grad.new_empty(plan.asked.shape[0], grad.shape[1])
        torch.distributed.all_to_all_single(
            home,
            grad.contiguous(),
            list(plan.asked_splits),
            list(plan.wanted_splits),
            group=ctx.group,
        )
        return segment_sum(home, plan.asked, ctx.num_own).to(ctx.dtype), None, None


def fetch_rows(
    values: torch.Tensor, plan: RowPlan, group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Own rows ``[S, H]`` -> the rows that ``plan.ids`` point into, fp32 (fp64 for fp64).

    ``[S, H]`` on one rank, ``[W * S, H]`` as a table, else ``[U, H]``. Gradients of a row are
    summed over its reads in fp32 before they travel, and at home again.

    Communicates over ``group``: one all-to-all in the dtype of ``values`` and in the backward pass
    one in fp32; as a table one all-gather and one reduce-scatter; on one rank nothing.
    """
    if plan.is_table or plan.asked is None:
        return gather_table(values, group)
    return _SendRows.apply(values, plan, group)


def read_rows(rows: torch.Tensor, plan: RowPlan, dtype: torch.dtype) -> torch.Tensor:
    """What T tokens read of fetched rows: sums over addresses, ``[T, H]`` in ``dtype``."""
    return sum_looked_up_rows(rows, plan.ids, 1.0, dtype)
