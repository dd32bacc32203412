"""Who owns which row, and plans by which every rank finds its rows."""

from __future__ import annotations

import pytest
import torch
from collective_log import logged_collectives, names_of
from owners import owner_of_code

from vqmoe_megatron.moe.memory.row_plan import RowPlaces

EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"
LAYOUTS = {
    "ep4": ({EP: 4}, (4, 1)),
    "etp4": ({ETP: 4}, (1, 4)),
    "ep2etp2": ({EP: 2, ETP: 2}, (2, 2)),
}


@pytest.mark.parametrize("sizes", [(48, 4, 1, 1), (48, 4, 2, 1), (48, 4, 4, 3), (48, 8, 2, 2)])
def test_every_row_has_one_slot_at_its_owner(sizes: tuple[int, int, int, int]) -> None:
    num_rows, num_experts, expert_ranks, shard_ranks = sizes
    places = RowPlaces(*sizes)
    rows = torch.arange(num_rows)
    slots = places.slots(rows)
    assert sorted(slots.tolist()) == rows.tolist()
    local_experts, block = places.local_shape
    assert local_experts * block == places.rows_per_rank == num_rows // places.num_ranks
    for row, slot in enumerate(slots.tolist()):
        owner = owner_of_code(row, num_experts, expert_ranks)
        number, shard = row // num_experts, row // num_experts // block
        assert slot // places.rows_per_rank == owner * shard_ranks + shard
        place = row % num_experts % local_experts * block + number % block
        assert slot % places.rows_per_rank == place


def test_slots_keep_shape() -> None:
    rows = torch.arange(12).view(2, 3, 2)
    assert RowPlaces(12, 2, 1, 1).slots(rows).shape == rows.shape


def make_plan(sizes: list[int], exchange: str, kind: str) -> dict:
    """In a rank: plan random reads; what arrives if every owner sends the slots it is asked for."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from vqmoe_megatron.moe.memory.row_plan import plan_rows, sharing_group

    group = sharing_group(get_default_pg_collection())
    places = RowPlaces(48, 4, *sizes)
    generator = torch.Generator().manual_seed(10 + group.rank())
    rows = torch.randint(48, (5, 3), generator=generator)
    if kind == "one row":
        rows[:] = 6
    if kind == "idle":  # this rank reads what only the first rank owns
        rows[:] = rows % 3 * 4
    with logged_collectives() as calls:
        plan = plan_rows(rows, places, exchange, group)
    found = {"calls": names_of(calls), "is_table": plan.is_table, "slots": places.slots(rows)}
    if plan.is_table:
        return found | {"found": plan.ids}
    own = torch.arange(places.rows_per_rank) + group.rank() * places.rows_per_rank
    sent = own[plan.asked]
    wanted = sent.new_empty(plan.num_wanted)
    splits = list(plan.wanted_splits), list(plan.asked_splits)
    torch.distributed.all_to_all_single(wanted, sent, *splits, group=group)
    return found | {
        "found": wanted[plan.ids],
        "wanted": wanted,
        "asked": list(plan.asked_splits),
    }


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["random", "one row", "idle"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_token_finds_its_rows(layout: str, kind: str, ranks) -> None:  # noqa: ANN001
    sizes, counts = LAYOUTS[layout]
    results = ranks(4).run(make_plan, list(counts), "rows", kind, layout=sizes)
    for result in results:
        assert torch.equal(result["found"], result["slots"])
        assert result["wanted"].unique().numel() == result["wanted"].numel()  # each once
        assert result["calls"] == ["all_to_all_single"] * 2
    if kind != "random":  # others are asked for nothing
        is_asked = [sum(result["asked"]) > 0 for result in results]
        assert sum(is_asked) < 4 and any(is_asked)


@pytest.mark.distributed
def test_a_table_needs_no_plan(ranks) -> None:  # noqa: ANN001
    sizes, counts = LAYOUTS["ep2etp2"]
    for result in ranks(4).run(make_plan, list(counts), "table", "random", layout=sizes):
        assert result["is_table"] and result["calls"] == []
        assert torch.equal(result["found"], result["slots"])
