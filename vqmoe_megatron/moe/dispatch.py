"""The code-driven all-to-all: rows travel to the ranks that own their expert, and back.

R rows on this rank, R' rows received, S resident rows, H hidden size, N experts, n local experts,
P = N / n expert-parallel ranks; expert e lives on expert-parallel rank e // n. E expert-tensor
ranks hold one shard each of the same n experts, and have different tokens.

1. The permutation plan (sort by expert, then code; counts by bincount) comes in.
2. Counts are exchanged: [P, n] out, [P, n] in. At E > 1 the received ones are gathered: [E, P, n].
3. THE host synchronisation of the layer: the counts become split sizes.
4. Rows are permuted and exchanged.
5. At E > 1 the expert-tensor group gathers what its ranks received: a shard needs every row.
6. Arrived rows, ordered by (expert-tensor rank, source rank, local expert), are regrouped by local
   expert. Resident rows (of code space: this rank's code rows, which never travel) join here, so
   that both are evaluated by one grouped GEMM.
7. ``combine`` walks 6, 5 and 4 backwards with the receipt; step 5 backwards sums the shards'
   partial results. Nothing is remembered between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import all_to_all

from vqmoe_megatron.moe.expert_tensor_exchange import gather_rows, reduce_scatter_rows
from vqmoe_megatron.vq.permutation import (
    PermutationPlan,
    append_residents,
    plan_permutation,
)


@dataclass(frozen=True)
class ResidentRows:
    """Rows that are evaluated where they are, the same on the ranks of the expert-tensor group."""

    rows: torch.Tensor  # [S, H], sorted by local expert
    rows_per_local_expert: torch.Tensor  # int64 [n], summing to S
    rows_per_expert: int | None = None  # S / n where the host knows that all experts have as many


@dataclass(frozen=True)
class DispatchReceipt:
    """All that ``combine`` needs to bring the rows back in their first order."""

    plan: PermutationPlan
    tokens_per_local_expert: torch.Tensor  # int64 [n], residents included
    regroup: PermutationPlan | None  # of arrived rows; None when they arrive grouped
    input_splits: list[int]  # rows sent to each of P ranks; empty at P = 1
    output_splits: list[int]  # rows received from each of P ranks; empty at P = 1
    gathered_sizes: list[int]  # rows received by each of E ranks; empty at E = 1
    num_residents: tuple[int, ...] = ()  # S of each set


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
    rows: torch.Tensor,
    plan: PermutationPlan,
    ep_group: torch.distributed.ProcessGroup,
    expt_tp_group: torch.distributed.ProcessGroup,
    residents: Sequence[ResidentRows] = (),
    read_sizes: Callable[[torch.Tensor], list[int]] = lambda sizes: sizes.tolist(),
) -> tuple[torch.Tensor, DispatchReceipt]:
    """Send every row to the ranks of its expert.

    Args:
        rows: ``[R, H]``.
        plan: of the R rows over N experts.
        ep_group: the P expert-parallel ranks; N must divide by P.
        expt_tp_group: the E ranks that hold shards of this rank's experts.
        residents: sets of rows to evaluate along with those that arrive.
        read_sizes: reads the 2 P + E split sizes on the host.

    Returns:
        ``[R' + S, H]`` rows sorted by local expert, equal on the ranks of ``expt_tp_group``, and
        the receipt.

    Communicates over ``ep_group`` one all-to-all of counts and one of rows (none at P = 1), over
    ``expt_tp_group`` one all-gather of counts and one of rows (none at E = 1). One host
    synchronisation (none at P = E = 1).
    """
    num_sources, num_shards = ep_group.size(), expt_tp_group.size()
    num_residents = tuple(set_.rows.shape[0] for set_ in residents)
    if num_sources == num_shards == 1:
        for set_, num_rows in zip(residents, num_residents, strict=True):
            rows = torch.cat([rows, set_.rows])
            plan = append_residents(plan, set_.rows_per_local_expert, num_rows)
        permuted = _Permute.apply(rows, plan.order, plan.inverse)
        return permuted, DispatchReceipt(
            plan, plan.tokens_per_expert, None, [], [], [], num_residents
        )

    permuted = _Permute.apply(rows, plan.order, plan.inverse)
    sent = plan.tokens_per_expert.view(num_sources, -1)  # [P, n]
    counts = _exchange_counts(sent, ep_group, expt_tp_group)  # [E, P, n]
    received = counts[expt_tp_group.rank()]  # [P, n]
    sizes = torch.cat([sent.sum(dim=1), received.sum(dim=1), counts.sum(dim=(1, 2))])
    sizes = read_sizes(sizes)  # host synchronisation
    arrived, input_splits, output_splits, gathered_sizes = permuted, [], [], []
    if num_sources > 1:
        input_splits, output_splits = sizes[:num_sources], sizes[num_sources : 2 * num_sources]
        arrived = all_to_all(ep_group, arrived, output_splits, input_splits)
    if num_shards > 1:
        gathered_sizes = sizes[2 * num_sources :]
        arrived = gather_rows(arrived, gathered_sizes, expt_tp_group)

    blocks = counts.reshape(-1, sent.shape[1])  # [E P, n]
    for set_ in residents:
        arrived = torch.cat([arrived, set_.rows])
        blocks = torch.cat([blocks, set_.rows_per_local_expert.unsqueeze(0)])
    regroup = None
    if blocks.shape[1] > 1:
        local_expert = torch.arange(blocks.shape[1], device=rows.device).repeat(blocks.shape[0])
        local_expert = local_expert.repeat_interleave(
            blocks.reshape(-1), output_size=arrived.shape[0]
        )
        regroup = plan_permutation(local_expert, blocks.shape[1])
        arrived = _Permute.apply(arrived, regroup.order, regroup.inverse)
    receipt = DispatchReceipt(
        plan,
        blocks.sum(dim=0),
        regroup,
        input_splits,
        output_splits,
        gathered_sizes,
        num_residents,
    )
    return arrived, receipt


def _exchange_counts(
    sent: torch.Tensor,
    ep_group: torch.distributed.ProcessGroup,
    expt_tp_group: torch.distributed.ProcessGroup,
) -> torch.Tensor:
    """int64 ``[P, n]`` rows sent -> ``[E, P, n]`` rows that each shard's rank receives from each
    source for each local expert. Communicates over both groups where they have several ranks."""
    received = sent.contiguous()
    if ep_group.size() > 1:
        received = torch.empty_like(received)
        torch.distributed.all_to_all_single(received, sent.contiguous(), group=ep_group)
    if expt_tp_group.size() == 1:
        return received.unsqueeze(0)
    counts = received.new_empty(expt_tp_group.size() * received.numel())
    torch.distributed.all_gather_into_tensor(counts, received.view(-1), group=expt_tp_group)
    return counts.view(-1, *received.shape)


def combine(
    rows: torch.Tensor,
    receipt: DispatchReceipt,
    ep_group: torch.distributed.ProcessGroup,
    expt_tp_group: torch.distributed.ProcessGroup,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Bring expert outputs ``[R' + S, H]`` back to the order of the rows given to :func:`dispatch`.

    At E > 1 they are this shard's part of each output; the parts of travelled rows are summed,
    those of residents are not.

    Returns ``[R, H]`` and each set of residents' ``[S, H]``. Communicates over ``expt_tp_group``
    one reduce-scatter (none at E = 1), over ``ep_group`` one all-to-all (none at P = 1).
    """
    if not receipt.input_splits and not receipt.gathered_sizes:
        rows = _Permute.apply(rows, receipt.plan.inverse, receipt.plan.order)
        return _split_residents(rows, receipt.num_residents)
    if receipt.regroup is not None:
        rows = _Permute.apply(rows, receipt.regroup.inverse, receipt.regroup.order)
    rows, residents = _split_residents(rows, receipt.num_residents)
    if receipt.gathered_sizes:
        rows = reduce_scatter_rows(rows, receipt.gathered_sizes, expt_tp_group)
    if receipt.input_splits:
        rows = all_to_all(ep_group, rows, receipt.input_splits, receipt.output_splits)
    return _Permute.apply(rows, receipt.plan.inverse, receipt.plan.order), residents


def _split_residents(
    rows: torch.Tensor, num_residents: tuple[int, ...]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    if not num_residents:  # a split's gradient would copy all rows
        return rows, []
    travelled, *residents = rows.split([rows.shape[0] - sum(num_residents), *num_residents])
    return travelled, residents
