"""Expert ownership: contiguous blocks, drawn and asserted by exact index."""

from __future__ import annotations

import pytest

from vqmoe_megatron.plan.ownership import experts_of_rank, owner_of_code, owner_rank


def test_experts_lie_in_contiguous_blocks() -> None:
    # N = 8, P = 4      rank     0      1      2      3
    #                   experts  0 1    2 3    4 5    6 7
    assert [owner_rank(e, 8, 4) for e in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [list(experts_of_rank(r, 8, 4)) for r in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_codes_follow_their_expert_through_the_mod_map() -> None:
    # code    0 1 2 3 4 5 6 7 8 9
    # expert  0 1 2 3 0 1 2 3 0 1      (mod 4)
    # rank    0 0 1 1 0 0 1 1 0 0      (two experts per rank)
    assert [owner_of_code(c, 4, 2) for c in range(10)] == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(("num_experts", "ep"), [(1, 1), (8, 1), (8, 8), (12, 3)])
def test_every_expert_is_owned_by_exactly_the_rank_that_lists_it(num_experts: int, ep: int) -> None:
    listed = [e for rank in range(ep) for e in experts_of_rank(rank, num_experts, ep)]
    assert listed == list(range(num_experts))
    for expert in range(num_experts):
        assert expert in experts_of_rank(owner_rank(expert, num_experts, ep), num_experts, ep)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: owner_rank(8, 8, 4), "expert 8 of 8"),
        (lambda: owner_rank(-1, 8, 4), "expert -1 of 8"),
        (lambda: owner_rank(0, 8, 3), "8 % 3 = 2"),
        (lambda: owner_rank(0, 8, 0), "at least 1"),
        (lambda: experts_of_rank(4, 8, 4), "rank 4 of 4"),
        (lambda: owner_of_code(-1, 8, 4), "code -1"),
        (lambda: owner_of_code(3, 0, 1), "at least 1"),
    ],
)
def test_impossible_ownership_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
