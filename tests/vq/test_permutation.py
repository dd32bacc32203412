"""The permutation plan, drawn and asserted by index, experts without rows included.

row     0  1  2  3  4  5
expert  2  0  2  0  2  0      expert 1 and expert 3 have no row
code    7  4  3  4  7  1
sorted by (expert, code), source order among equals:
        5  1  3 | 2  0  4

Three resident rows 6 7 8, of experts 0 1 2, lie behind the others of their expert:

        5  1  3  6 | 7 | 2  0  4  8
"""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.vq.permutation import append_residents, plan_permutation

EXPERTS = torch.tensor([2, 0, 2, 0, 2, 0])
CODES = torch.tensor([7, 4, 3, 4, 7, 1])


def test_rows_are_sorted_by_expert_then_code_then_source() -> None:
    plan = plan_permutation(EXPERTS, 4, CODES)
    assert plan.order.tolist() == [5, 1, 3, 2, 0, 4]
    assert plan.tokens_per_expert.tolist() == [3, 0, 3, 0]
    assert plan.inverse.tolist() == [4, 1, 3, 2, 5, 0]


def test_without_codes_the_source_order_is_kept() -> None:
    plan = plan_permutation(EXPERTS, 4)
    assert plan.order.tolist() == [1, 3, 5, 0, 2, 4]


def test_inverse_undoes_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, 8, (100,), generator=generator)
    codes = torch.randint(0, 2**31, (100,), generator=generator)  # codes never spill over
    plan = plan_permutation(experts, 8, codes)
    rows = torch.arange(100)
    assert torch.equal(rows[plan.order][plan.inverse], rows)
    assert torch.equal(experts[plan.order], experts.sort().values)


def test_no_rows() -> None:
    plan = plan_permutation(torch.zeros(0, dtype=torch.int64), 3)
    assert plan.order.numel() == 0 and plan.tokens_per_expert.tolist() == [0, 0, 0]


def test_residents_lie_behind_the_rows_of_their_expert() -> None:
    plan = append_residents(plan_permutation(EXPERTS, 4, CODES), torch.tensor([1, 1, 1, 0]), 3)
    assert plan.order.tolist() == [5, 1, 3, 6, 7, 2, 0, 4, 8]
    assert plan.tokens_per_expert.tolist() == [4, 1, 4, 0]


@pytest.mark.parametrize("num_rows", [0, 1, 50])
@pytest.mark.parametrize("num_residents", [0, 1, 20])
@pytest.mark.parametrize("num_experts", [1, 7])
def test_appending_is_planning_the_concatenation(
    num_rows: int, num_residents: int, num_experts: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows + num_residents)
    for _ in range(20):
        experts = torch.randint(num_experts, (num_rows,), generator=generator)
        codes = torch.randint(5, (num_rows,), generator=generator)
        residents = torch.randint(num_experts, (num_residents,), generator=generator).sort().values
        behind_all_codes = torch.full((num_residents,), 5)
        expected = plan_permutation(
            torch.cat([experts, residents]), num_experts, torch.cat([codes, behind_all_codes])
        )
        plan = append_residents(
            plan_permutation(experts, num_experts, codes),
            torch.bincount(residents, minlength=num_experts),
            num_residents,
        )
        assert torch.equal(plan.order, expected.order)
        assert torch.equal(plan.tokens_per_expert, expected.tokens_per_expert)
