"""The code-driven all-to-all, drawn and asserted by index on two expert-parallel ranks.

N = 4 experts, P = 2 ranks, n = 2 local experts: rank 0 has experts 0 and 1, rank 1 has 2 and 3.
A row is its number; rank 1's rows start at 100. Expert 1 gets nothing from anybody.

    rank 0   row     0  1  2  3  4          rank 1   row   100 101 102
             expert  3  0  2  0  3                   expert  2   2   0
    arrives on rank 0   expert 0: 1 3 | 102     expert 1: -
    arrives on rank 1   expert 2: 2 | 100 101   expert 3: 0 4
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.distributed

ROWS = ([0, 1, 2, 3, 4], [100, 101, 102])
EXPERTS = ([3, 0, 2, 0, 3], [2, 2, 0])
ARRIVED = ([1, 3, 102], [2, 100, 101, 0, 4])
COUNTS = ([3, 0], [3, 2])


def exchange(rows: list, experts: list) -> dict:
    """In a rank: dispatch rows (as [R, 1]), multiply by 10, bring them back, differentiate."""
    from megatron.core import parallel_state

    from vqmoe_megatron.moe.dispatch import combine, dispatch
    from vqmoe_megatron.vq.permutation import plan_permutation

    group = parallel_state.get_expert_model_parallel_group()
    own = torch.tensor(rows[group.rank()], dtype=torch.float64).unsqueeze(1).requires_grad_()
    plan = plan_permutation(torch.tensor(experts[group.rank()], dtype=torch.int64), 4)
    arrived, receipt = dispatch(own, plan, group)
    returned = combine(10 * arrived, receipt, group)
    (returned * (1 + own.detach())).sum().backward()
    return {
        "arrived": arrived.detach().squeeze(1),
        "counts": receipt.tokens_per_local_expert,
        "returned": returned.detach().squeeze(1),
        "gradient": own.grad.squeeze(1),
        "rank": group.rank(),
    }


def test_rows_arrive_grouped_by_expert_and_return_in_order(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2}
    for result in ranks(4).run(exchange, list(ROWS), list(EXPERTS), layout=layout):
        rank = result["rank"]
        rows = torch.tensor(ROWS[rank], dtype=torch.float64)
        assert result["arrived"].tolist() == ARRIVED[rank]
        assert result["counts"].tolist() == COUNTS[rank]
        assert torch.equal(result["returned"], 10 * rows)
        assert torch.equal(result["gradient"], 10 * (1 + rows))


def test_a_rank_without_rows_and_experts_without_rows(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2}
    for result in ranks(4).run(exchange, [[], [5, 6]], [[], [1, 1]], layout=layout):
        rank = result["rank"]
        assert result["arrived"].tolist() == [[5, 6], []][rank]
        assert result["counts"].tolist() == [[0, 2], [0, 0]][rank]
        assert result["returned"].tolist() == [[], [50, 60]][rank]


def test_one_rank_only_permutes(ranks) -> None:  # noqa: ANN001
    (result,) = ranks(1).run(exchange, [list(range(5))], [EXPERTS[0]])
    assert result["arrived"].tolist() == [1, 3, 2, 0, 4]
    assert result["counts"].tolist() == [2, 0, 1, 2]
    assert result["returned"].tolist() == [0, 10, 20, 30, 40]
