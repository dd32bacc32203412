"""Where code rows are evaluated, by brute force over ranks and experts, and one layout drawn.

N = 4 experts on P = 2 ranks, 7 rows by the mod rule: expert 0 has rows 0 4, 1 has 1 5, 2 has 2 6,
3 has 3. So rank 0 owns four rows and rank 1 three; both have S = 4 slots:

    rank 0   slot   0 1 | 2 3      rank 1   slot   4 5 | 6 7
             row    0 4 | 1 5               row    2 6 | 3 3      (slot 7 is spare)
"""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.moe.code_rows import CodeRows, place_code_rows
from vqmoe_megatron.vq.code_map import balanced_map, mod_map


def all_places(expert_of_row: torch.Tensor, num_experts: int, num_ranks: int) -> list[CodeRows]:
    return [place_code_rows(expert_of_row, num_experts, num_ranks, r) for r in range(num_ranks)]


def test_the_drawn_layout() -> None:
    first, second = all_places(mod_map(7, 4), 4, 2)
    assert first.local_rows.tolist() == [0, 4, 1, 5]
    assert second.local_rows.tolist() == [2, 6, 3, 3]
    assert first.rows_per_local_expert.tolist() == second.rows_per_local_expert.tolist() == [2, 2]
    assert first.expert_of_slot.tolist() == second.expert_of_slot.tolist() == [0, 0, 1, 1]
    for place in (first, second):
        assert place.slot_of_row.tolist() == [0, 2, 4, 6, 1, 3, 5]
        assert place.num_local_slots == 4 and place.num_slots == 8 and place.rows_per_expert == 2


def drawn_maps(num_experts: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_experts)
    load = torch.randint(0, 100, (4 * num_experts,), generator=generator)
    return {
        "mod": mod_map(3 * num_experts, num_experts),
        "uneven mod": mod_map(2 * num_experts + 1, num_experts),
        "fewer rows than experts": mod_map(max(1, num_experts // 2), num_experts),
        "one row": torch.tensor([num_experts - 1]),
        "balanced": balanced_map(load, num_experts),
        "random": torch.randint(0, num_experts, (37,), generator=generator),
        "one expert": torch.full((5,), num_experts // 2),
    }


@pytest.mark.parametrize("name", drawn_maps(4))
@pytest.mark.parametrize(
    ("num_experts", "num_ranks"), [(1, 1), (4, 1), (4, 2), (4, 4), (8, 2), (12, 4)]
)
def test_every_row_has_one_slot_on_its_experts_owner(
    name: str, num_experts: int, num_ranks: int
) -> None:
    expert_of_row = drawn_maps(num_experts)[name]
    places = all_places(expert_of_row, num_experts, num_ranks)
    num_local = num_experts // num_ranks
    rows_of_rank = [0] * num_ranks
    for expert in expert_of_row.tolist():
        rows_of_rank[expert // num_local] += 1
    num_slots = max(rows_of_rank)

    slot_of_row = places[0].slot_of_row.tolist()
    assert len(set(slot_of_row)) == len(slot_of_row) == expert_of_row.numel()
    for rank, place in enumerate(places):
        assert place.slot_of_row.tolist() == slot_of_row  # equal on all ranks
        assert place.local_rows.shape == place.expert_of_slot.shape == (num_slots,)
        assert place.num_slots == num_ranks * num_slots
        counts = [place.expert_of_slot.tolist().count(e) for e in range(num_local)]
        assert place.rows_per_local_expert.tolist() == counts and sum(counts) == num_slots
        assert place.rows_per_expert == (counts[0] if len(set(counts)) == 1 else None)
        assert place.expert_of_slot.tolist() == sorted(place.expert_of_slot.tolist())
        own = [row for row, e in enumerate(expert_of_row.tolist()) if e // num_local == rank]
        by_expert = sorted(own, key=lambda row: (int(expert_of_row[row]), row))
        assert place.local_rows[: len(own)].tolist() == by_expert
        spare = place.local_rows[len(own) :].tolist()
        stand_in = by_expert[-1] if own else spare[0]
        assert spare == [stand_in] * len(spare) and stand_in < expert_of_row.numel()
        assert all(
            rank * num_slots + slot not in slot_of_row for slot in range(len(own), num_slots)
        )
    for row, slot in enumerate(slot_of_row):
        rank, local = divmod(slot, num_slots)
        assert int(places[rank].local_rows[local]) == row
        expert = rank * num_local + int(places[rank].expert_of_slot[local])
        assert expert == int(expert_of_row[row])


def test_a_rank_without_rows_has_as_many_slots_as_the_others() -> None:
    _, second = all_places(torch.tensor([0, 1, 0]), 4, 2)
    assert second.num_local_slots == 3
    assert second.rows_per_local_expert.tolist() == [0, 3]  # evaluated, never looked up
    assert second.slot_of_row.tolist() == [0, 2, 1]
