"""The code-driven exchange, drawn and asserted by index on two ranks, expert-parallel or
expert-tensor-parallel, and on two times two.

N = 4 experts, P = 2 ranks, n = 2 local experts: rank 0 has experts 0 and 1, rank 1 has 2 and 3.
A row is its number; rank 1's rows start at 100. Expert 1 gets nothing from anybody.

    rank 0   row     0  1  2  3  4          rank 1   row   100 101 102
             expert  3  0  2  0  3                   expert  2   2   0
    arrives on rank 0   expert 0: 1 3 | 102     expert 1: -
    arrives on rank 1   expert 2: 2 | 100 101   expert 3: 0 4

With E = 2 expert-tensor ranks instead (P = 1, n = 4) both ranks need all rows:

    arrives on both     expert 0: 1 3 | 102     1: -     2: 2 | 100 101     3: 0 4

With P = E = 2, ranks 0 and 1 shard experts 0 and 1, ranks 2 and 3 shard experts 2 and 3; the
expert-parallel pairs are 0 2 and 1 3. Rows in order of (shard, source):

    rank 0   row     0 1     rank 1   row     100     rank 2   row   200     rank 3   row -
             expert  2 1              expert  1                expert  1
    arrives on 0 and 1   expert 0: -     expert 1: 1 200 | 100
    arrives on 2 and 3   expert 2: 0     expert 3: -
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
    """In a rank: dispatch rows (as [R, 1]), multiply by 10, bring them back, differentiate.

    Each of E shards contributes an equal part of the product.
    """
    from megatron.core import parallel_state

    from vqmoe_megatron.moe.dispatch import combine, dispatch
    from vqmoe_megatron.vq.permutation import plan_permutation

    groups = (
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
    )
    place = torch.distributed.get_rank() % len(rows)
    own = torch.tensor(rows[place], dtype=torch.float64).unsqueeze(1).requires_grad_()
    plan = plan_permutation(torch.tensor(experts[place], dtype=torch.int64), 4)
    arrived, receipt = dispatch(own, plan, *groups)
    returned = combine(10 / groups[1].size() * arrived, receipt, *groups)
    (returned * (1 + own.detach())).sum().backward()
    return {
        "arrived": arrived.detach().squeeze(1),
        "counts": receipt.tokens_per_local_expert,
        "returned": returned.detach().squeeze(1),
        "gradient": own.grad.squeeze(1),
        "place": place,
    }


def test_rows_arrive_grouped_by_expert_and_return_in_order(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2}
    for result in ranks(4).run(exchange, list(ROWS), list(EXPERTS), layout=layout):
        rank = result["place"]
        rows = torch.tensor(ROWS[rank], dtype=torch.float64)
        assert result["arrived"].tolist() == ARRIVED[rank]
        assert result["counts"].tolist() == COUNTS[rank]
        assert torch.equal(result["returned"], 10 * rows)
        assert torch.equal(result["gradient"], 10 * (1 + rows))


def test_a_rank_without_rows_and_experts_without_rows(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2}
    for result in ranks(4).run(exchange, [[], [5, 6]], [[], [1, 1]], layout=layout):
        rank = result["place"]
        assert result["arrived"].tolist() == [[5, 6], []][rank]
        assert result["counts"].tolist() == [[0, 2], [0, 0]][rank]
        assert result["returned"].tolist() == [[], [50, 60]][rank]


def test_one_rank_only_permutes(ranks) -> None:  # noqa: ANN001
    (result,) = ranks(1).run(exchange, [list(range(5))], [EXPERTS[0]])
    assert result["arrived"].tolist() == [1, 3, 2, 0, 4]
    assert result["counts"].tolist() == [2, 0, 1, 2]
    assert result["returned"].tolist() == [0, 10, 20, 30, 40]


def check_returned(results: list[dict], rows: list) -> None:
    for result in results:
        own = torch.tensor(rows[result["place"]], dtype=torch.float64)
        assert torch.equal(result["returned"], 10 * own)
        assert torch.equal(result["gradient"], 10 * (1 + own))


def test_shards_of_all_experts_get_all_rows(ranks) -> None:  # noqa: ANN001
    layout = {"expert_tensor_parallel_size": 2}
    results = ranks(2).run(exchange, list(ROWS), list(EXPERTS), layout=layout)
    for result in results:
        assert result["arrived"].tolist() == [1, 3, 102, 2, 100, 101, 0, 4]
        assert result["counts"].tolist() == [3, 0, 3, 2]
    check_returned(results, list(ROWS))


def test_shards_of_some_experts_get_the_rows_of_their_sources(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    rows, experts = [[0, 1], [100], [200], []], [[2, 1], [1], [1], []]
    results = ranks(4).run(exchange, rows, experts, layout=layout)
    for rank, result in enumerate(results):
        assert result["arrived"].tolist() == [[1, 200, 100], [0]][rank // 2]
        assert result["counts"].tolist() == [[0, 3], [1, 0]][rank // 2]
    check_returned(results, rows)


def test_shards_without_a_single_row(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    rows, experts = [[7], [], [], [8]], [[3], [], [], [2]]
    results = ranks(4).run(exchange, rows, experts, layout=layout)
    for rank, result in enumerate(results):
        assert result["arrived"].tolist() == [[], [8, 7]][rank // 2]
    check_returned(results, rows)
