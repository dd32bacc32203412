"""The code-driven all-to-all: rows travel to the rank that owns their expert, and back.

R rows on this rank, R' rows received, H hidden size, N experts, n local experts, P = N / n
expert-parallel ranks; expert e lives on rank e // n.

1. The permutation plan (sort by expert, then code; counts by bincount) comes in.
2. Counts are exchanged: [P, n] out, [P, n] in.
3. THE host synchronisation of the layer: the counts become split sizes.
4. Rows are permuted and exchanged.
5. Received rows, ordered by (source rank, local expert), are regrouped by local expert.
6. ``combine`` walks 5 and 4 backwards with the receipt. Nothing is remembered between calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import all_to_all

from vqmoe_megatron.vq.permutation import PermutationPlan, plan_permutation


@dataclass(frozen=True)
class DispatchReceipt:
    """All that ``combine`` needs to bring the rows back in their first order."""

    plan: PermutationPlan
    tokens_per_local_expert: torch.Tensor  # int64 [n]
    regroup: PermutationPlan | None  # of received rows; None when they arrive grouped
    input_splits: list[int] | None  # rows sent to each of P ranks; None at P = 1
    output_splits: list[int] | None  # rows received from each of P ranks


class _Permute(torch.autograd.Function):
    """rows[order], with a gather by the inverse as its gradient instead of a scatter-add."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor):  # noqa: ANN001, ANN205
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):  # noqa: ANN001, ANN205
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def dispatch(
    rows: torch.Tensor, plan: PermutationPlan, ep_group: torch.distributed.ProcessGroup
) -> tuple[torch.Tensor, DispatchReceipt]:
    """Send every row to its expert's rank.

    Args:
        rows: ``[R, H]``.
        plan: of the R rows over N experts.
        ep_group: the P expert-parallel ranks; N must divide by P.

    Returns:
        ``[R', H]`` rows sorted by local expert, and the receipt.

    Communicates over ``ep_group``: one all-to-all of counts, one of rows (none at P = 1). One host
    synchronisation (none at P = 1).
    """
    num_ranks = ep_group.size()
    permuted = _Permute.apply(rows, plan.order, plan.inverse())
    if num_ranks == 1:
        return permuted, DispatchReceipt(plan, plan.tokens_per_expert, None, None, None)

    sent = plan.tokens_per_expert.view(num_ranks, -1)  # [P, n]
    received = torch.empty_like(sent)  # [P, n], rows from each rank for my experts
    torch.distributed.all_to_all_single(received, sent.contiguous(), group=ep_group)
    splits = torch.stack([sent.sum(dim=1), received.sum(dim=1)]).tolist()  # host synchronisation
    input_splits, output_splits = splits
    arrived = all_to_all(ep_group, permuted, output_splits, input_splits)

    num_local = sent.shape[1]
    regroup = None
    if num_local > 1:
        local_expert = torch.arange(num_local, device=rows.device).repeat(num_ranks)
        local_expert = local_expert.repeat_interleave(
            received.reshape(-1), output_size=arrived.shape[0]
        )
        regroup = plan_permutation(local_expert, num_local)
        arrived = _Permute.apply(arrived, regroup.order, regroup.inverse())
    return arrived, DispatchReceipt(plan, received.sum(dim=0), regroup, input_splits, output_splits)


def combine(
    rows: torch.Tensor, receipt: DispatchReceipt, ep_group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """Bring expert outputs ``[R', H]`` back to the order of the rows given to :func:`dispatch`.

    Returns ``[R, H]``. Communicates over ``ep_group``: one all-to-all (none at P = 1).
    """
    if receipt.regroup is not None:
        rows = _Permute.apply(rows, receipt.regroup.inverse(), receipt.regroup.order)
    if receipt.input_splits is not None:
        rows = all_to_all(ep_group, rows, receipt.input_splits, receipt.output_splits)
    return _Permute.apply(rows, receipt.plan.inverse(), receipt.plan.order)
