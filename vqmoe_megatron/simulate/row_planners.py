"""Planners of a code memory's rows that count them, spread them evenly, or need no data at all.

W ranks share the rows of a layer. How many distinct rows a microbatch reads depends on the data; a
plan assumes an equal share of every owner, ``plan/distinct_rows.balanced_rows_per_owner``. The
planners here read as many. What the model learns from them means nothing; what it sends does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from vqmoe_megatron.moe.memory.code_stream import CodeStream
from vqmoe_megatron.moe.memory.row_plan import RowPlaces, RowPlanner, SortedReads
from vqmoe_megatron.plan.distinct_rows import balanced_rows_per_owner

RecordReads = Callable[[list[int], list[int]], None]  # rows wanted of, and asked by, every rank


class BalancedPlanner(RowPlanner):
    """Every rank reads equally many rows of every owner, as many as a plan expects."""

    def sort(self, slots: torch.Tensor, places: RowPlaces) -> SortedReads:
        """The first rows of every owner, by the number of reads alone."""
        per_owner = balanced_rows_per_owner(slots.numel(), places.num_rows, places.num_ranks)
        number = torch.arange(places.num_ranks * per_owner, device=slots.device)
        distinct = number // per_owner * places.rows_per_rank + number % per_owner
        reads = torch.arange(slots.numel(), device=slots.device) % distinct.numel()
        return SortedReads(distinct, torch.ones_like(distinct), reads.view_as(slots))


class CountedPlanner(RowPlanner):
    """Tells ``record`` of every plan's rows."""

    def __init__(self, record: RecordReads) -> None:
        self.record = record

    def read(self, counts: torch.Tensor) -> list[list[int]]:
        """As it is, and recorded."""
        wanted, asked = super().read(counts)
        self.record(wanted, asked)
        return [wanted, asked]


class BalancedCountedPlanner(BalancedPlanner, CountedPlanner):
    """Both."""


class SimulatedPlanner(BalancedPlanner):
    """Works on fake tensors: the one host synchronisation answers with balanced rows."""

    def __init__(self) -> None:
        self._num_wanted = 0

    def sort(self, slots: torch.Tensor, places: RowPlaces) -> SortedReads:
        """As balanced."""
        reads = super().sort(slots, places)
        self._num_wanted = reads.slots.numel()
        return reads

    def read(self, counts: torch.Tensor) -> list[list[int]]:
        """An equal share of every owner, and the same asked by every rank."""
        num_ranks = counts.shape[1]
        share = [self._num_wanted // num_ranks] * num_ranks
        return [share, share]


def use_planner(model: Iterable[torch.nn.Module], planner: RowPlanner) -> None:
    """Let the streams of codes in these chunks, if any, plan by ``planner``."""
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, CodeStream):
                module.planner = planner
