"""Which rows a microbatch reads and where they lie: made once for all layers, before the first.

T local tokens, A addresses per token, R rows per layer, N experts, P expert-parallel and E
expert-tensor ranks, W = P * E of them that share the rows, S = R / W rows each, U distinct rows
that this rank's tokens read.

Row r belongs to expert r mod N, so to expert-parallel rank (r mod N) // (N / P); an expert's R / N
rows are cut in E equal blocks over its expert-tensor ranks. Slot ``rank * S + place`` counts all
rows in the order of their owners.

Two forms. Rows: each rank asks owners for its distinct rows; counts and ids travel once per
microbatch, and the counts are read on the host. Table: every rank gathers all rows; nothing is
planned, no shape depends on the data. ``plan/distinct_rows`` says which sends less.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from vqmoe_megatron.plan.distinct_rows import gathers_table


@dataclass(frozen=True)
class RowPlaces:
    """Who owns which row; the same for every layer of a model."""

    num_rows: int  # R
    num_experts: int  # N
    expert_ranks: int  # P
    shard_ranks: int  # E

    @property
    def num_ranks(self) -> int:
        """W."""
        return self.expert_ranks * self.shard_ranks

    @property
    def local_shape(self) -> tuple[int, int]:
        """Local experts, and rows of each on one rank."""
        local_experts = self.num_experts // self.expert_ranks
        return local_experts, self.num_rows // self.num_experts // self.shard_ranks

    @property
    def rows_per_rank(self) -> int:
        """S."""
        return self.num_rows // self.num_ranks

    def slots(self, rows: torch.Tensor) -> torch.Tensor:
        """Row ids int64 -> slots int64 of the same shape. No communication."""
        local_experts, block = self.local_shape
        expert, number = rows % self.num_experts, rows // self.num_experts
        owner = expert // local_experts * self.shard_ranks + number // block
        return owner * self.rows_per_rank + expert % local_experts * block + number % block


@dataclass(frozen=True)
class RowPlan:
    """How T tokens read their rows. ``ids`` point into what the exchange brings."""

    ids: torch.Tensor  # int64 [T, A]: of slots (one rank, or table), or of this rank's U rows
    is_table: bool
    asked: torch.Tensor | None = None  # int64: own rows that others (and this rank) want, in order
    asked_splits: tuple[int, ...] = ()  # of ``asked`` by rank
    wanted_splits: tuple[int, ...] = ()  # of the U rows by owner

    @property
    def num_wanted(self) -> int:
        """U; 0 where nothing is asked for."""
        return sum(self.wanted_splits)


@dataclass(frozen=True)
class SortedReads:
    """What T tokens read, in the order of owners."""

    slots: torch.Tensor  # int64 [T * A], rising
    is_new: torch.Tensor  # int64 [T * A], 1 where a slot is the first of its kind, else 0
    ids: torch.Tensor  # int64 [T, A]: which distinct slot each read means


class RowPlanner:
    """Makes plans; others count what they take from the data, or do without data."""

    def plan(
        self,
        rows: torch.Tensor,
        places: RowPlaces,
        exchange: str,
        group: torch.distributed.ProcessGroup,
    ) -> RowPlan:
        """Plan the reads of row ids int64 ``[T, A]``.

        Communicates over ``group`` (``tp_ep``) in the form of rows: one all-to-all of W counts and
        one of ids, with one host synchronisation; every rank must call it. Otherwise not at all.
        """
        slots = places.slots(rows)
        num_ranks = places.num_ranks
        if num_ranks == 1:
            return RowPlan(slots, is_table=False)
        if gathers_table(exchange, slots.numel(), places.num_rows):
            return RowPlan(slots, is_table=True)
        reads = self.sort(slots, places)
        counts = torch.zeros(num_ranks, dtype=torch.int64, device=rows.device)
        counts = counts.index_add_(0, reads.slots // places.rows_per_rank, reads.is_new)
        received = torch.empty_like(counts)
        torch.distributed.all_to_all_single(received, counts, group=group)
        wanted_splits, asked_splits = self.read(torch.stack([counts, received]))
        distinct = reads.slots.new_empty(sum(wanted_splits))
        distinct = distinct.scatter_(0, reads.is_new.cumsum(dim=0) - 1, reads.slots)
        asked = distinct.new_empty(sum(asked_splits))
        torch.distributed.all_to_all_single(
            asked, distinct % places.rows_per_rank, asked_splits, wanted_splits, group=group
        )
        return RowPlan(reads.ids, False, asked, tuple(asked_splits), tuple(wanted_splits))

    def sort(self, slots: torch.Tensor, places: RowPlaces) -> SortedReads:
        """Sort the slots int64 ``[T, A]``; torch.unique would wait for the host once more."""
        ordered, order = slots.flatten().sort()
        is_new = torch.cat([torch.ones_like(ordered[:1]), (ordered[1:] != ordered[:-1]).long()])
        numbers = is_new.cumsum(dim=0) - 1
        ids = torch.empty_like(numbers).scatter_(0, order, numbers).view_as(slots)
        return SortedReads(ordered, is_new, ids)

    def read(self, counts: torch.Tensor) -> list[list[int]]:
        """int64 ``[2, W]``, rows wanted of and asked by every rank: the host synchronisation."""
        return counts.tolist()


def plan_rows(
    rows: torch.Tensor, places: RowPlaces, exchange: str, group: torch.distributed.ProcessGroup
) -> RowPlan:
    """:meth:`RowPlanner.plan` of what the data reads."""
    return RowPlanner().plan(rows, places, exchange, group)


def sharing_group(pg_collection: ProcessGroupCollection) -> torch.distributed.ProcessGroup:
    """``tp_ep``, the W ranks that share a layer's rows.

    Raises:
        ValueError: where its order is not (expert-parallel, expert-tensor), which slots rest on.
    """
    group, ep, expt_tp = pg_collection.tp_ep, pg_collection.ep, pg_collection.expt_tp
    if group.rank() != ep.rank() * expt_tp.size() + expt_tp.rank():
        raise ValueError(
            f"the group of expert and expert-tensor ranks has rank {group.rank()} where expert "
            f"rank {ep.rank()} and expert-tensor rank {expt_tp.rank()} of {expt_tp.size()} stand; "
            "code memory needs Megatron's order, in which expert-tensor ranks run faster"
        )
    return group
