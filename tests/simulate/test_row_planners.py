"""Balanced planners read what a plan expects, and counted ones tell what travels."""

from __future__ import annotations

import torch

from vqmoe_megatron.moe.memory.row_plan import RowPlaces
from vqmoe_megatron.plan.distinct_rows import balanced_rows_per_owner
from vqmoe_megatron.simulate.row_planners import (
    BalancedPlanner,
    CountedPlanner,
    SimulatedPlanner,
)

PLACES = RowPlaces(num_rows=96, num_experts=8, expert_ranks=2, shard_ranks=2)
SLOTS = torch.zeros(10, 3, dtype=torch.int64)  # all reads of one row


def test_balanced_reads_are_spread_over_owners() -> None:
    reads = BalancedPlanner().sort(SLOTS, PLACES)
    distinct, ids = reads.slots, reads.ids
    assert reads.is_new.tolist() == [1] * distinct.numel()
    per_owner = balanced_rows_per_owner(30, 96, 4)
    assert torch.bincount(distinct // PLACES.rows_per_rank).tolist() == [per_owner] * 4
    assert torch.equal(distinct, distinct.unique())
    assert ids.shape == SLOTS.shape
    assert set(ids.flatten().tolist()) <= set(range(distinct.numel()))


def test_a_simulated_plan_needs_no_values() -> None:
    planner = SimulatedPlanner()
    distinct = planner.sort(SLOTS, PLACES).slots
    wanted, asked = planner.read(torch.zeros(2, 4, dtype=torch.int64))
    assert wanted == asked == [distinct.numel() // 4] * 4


def test_a_counted_plan_is_that_of_the_data() -> None:
    told: list[tuple[list[int], list[int]]] = []
    planner = CountedPlanner(lambda *rows: told.append(rows))
    reads = planner.sort(SLOTS + 5, PLACES)
    assert reads.slots[reads.is_new.bool()].tolist() == [5]
    assert not reads.ids.any()
    counts = torch.tensor([[1, 0, 0, 0], [2, 0, 1, 0]])
    assert planner.read(counts) == counts.tolist()
    assert told == [tuple(counts.tolist())]
