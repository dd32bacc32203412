"""The permutation plan, drawn and asserted by index, experts without rows included.

row     0  1  2  3  4  5
expert  2  0  2  0  2  0      expert 1 and expert 3 have no row
code    7  4  3  4  7  1
sorted by (expert, code), source order among equals:
        5  1  3 | 2  0  4
"""

from __future__ import annotations

import torch

from vqmoe_megatron.vq.permutation import plan_permutation

EXPERTS = torch.tensor([2, 0, 2, 0, 2, 0])
CODES = torch.tensor([7, 4, 3, 4, 7, 1])


def test_rows_are_sorted_by_expert_then_code_then_source() -> None:
    plan = plan_permutation(EXPERTS, 4, CODES)
    assert plan.order.tolist() == [5, 1, 3, 2, 0, 4]
    assert plan.tokens_per_expert.tolist() == [3, 0, 3, 0]
    assert plan.inverse().tolist() == [4, 1, 3, 2, 5, 0]


def test_without_codes_the_source_order_is_kept() -> None:
    plan = plan_permutation(EXPERTS, 4)
    assert plan.order.tolist() == [1, 3, 5, 0, 2, 4]


def test_inverse_undoes_the_order() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, 8, (100,), generator=generator)
    codes = torch.randint(0, 2**31, (100,), generator=generator)  # codes never spill over
    plan = plan_permutation(experts, 8, codes)
    rows = torch.arange(100)
    assert torch.equal(rows[plan.order][plan.inverse()], rows)
    assert torch.equal(experts[plan.order], experts.sort().values)


def test_no_rows() -> None:
    plan = plan_permutation(torch.zeros(0, dtype=torch.int64), 3)
    assert plan.order.numel() == 0 and plan.tokens_per_expert.tolist() == [0, 0, 0]
