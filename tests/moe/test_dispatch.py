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

Resident rows, here 500 and more, lie behind the arrived ones of their expert and never travel.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.distributed

ROWS = ([0, 1, 2, 3, 4], [100, 101, 102])
EXPERTS = ([3, 0, 2, 0, 3], [2, 2, 0])
ARRIVED = ([1, 3, 102], [2, 100, 101, 0, 4])
COUNTS = ([3, 0], [3, 2])


def exchange(rows: list, experts: list, residents: list | None = None, num_sets: int = 1) -> dict:
    """In a rank: dispatch rows (as [R, 1]), multiply by 10, bring them back, differentiate.

    Each of E shards contributes an equal part of the product. ``residents`` has, for each
    expert-parallel rank, its resident rows and how many each local expert has; they come in
    ``num_sets`` equal sets, the numbers of the second counted on from the first.
    """
    from megatron.core import parallel_state

    from vqmoe_megatron.moe.dispatch import ResidentRows, combine, dispatch
    from vqmoe_megatron.vq.permutation import plan_permutation

    groups = (
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
    )
    place = torch.distributed.get_rank() % len(rows)
    own = torch.tensor(rows[place], dtype=torch.float64).unsqueeze(1).requires_grad_()
    plan = plan_permutation(torch.tensor(experts[place], dtype=torch.int64), 4)
    joined = []
    if residents is not None:
        numbers, counts = residents[groups[0].rank()]
        for number in range(num_sets):
            staying = torch.tensor(numbers, dtype=torch.float64).unsqueeze(1) + 50 * number
            joined.append(ResidentRows(staying.requires_grad_(), torch.tensor(counts)))
    arrived, receipt = dispatch(own, plan, *groups, joined)
    returned, evaluated = combine(10 / groups[1].size() * arrived, receipt, *groups)
    loss = (returned * (1 + own.detach())).sum()
    for answer, asked in zip(evaluated, joined, strict=True):
        loss = loss + (answer * (2 + asked.rows.detach())).sum()
    loss.backward()
    return {
        "residents": [answer.detach().squeeze(1) for answer in evaluated],
        "residents' gradient": [asked.rows.grad.squeeze(1) for asked in joined],
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


def check_residents(result: dict, residents: list[int], num_shards: int = 1) -> None:
    """Each shard keeps its own part of the outputs: here an equal one."""
    assert len(result["residents"]) == len(result["residents' gradient"]) >= 1
    for number, found in enumerate(result["residents"]):
        own = torch.tensor(residents, dtype=torch.float64) + 50 * number
        assert torch.equal(found, 10 / num_shards * own)
        assert torch.equal(result["residents' gradient"][number], 10 / num_shards * (2 + own))


RESIDENTS = [[[500, 501, 502], [1, 2]], [[600], [0, 1]]]


def test_without_residents_none_return(ranks) -> None:  # noqa: ANN001
    (result,) = ranks(1).run(exchange, [[3, 4]], [[1, 0]])
    assert result["residents"] == []


def test_residents_join_their_experts_and_stay(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2}
    results = ranks(4).run(exchange, list(ROWS), list(EXPERTS), RESIDENTS, layout=layout)
    for result in results:
        place = result["place"]
        arrived = [[1, 3, 102, 500, 501, 502], [2, 100, 101, 0, 4, 600]]
        assert result["arrived"].tolist() == arrived[place]
        assert result["counts"].tolist() == [[4, 2], [3, 3]][place]
        check_residents(result, RESIDENTS[place][0])
    check_returned(results, list(ROWS))


def test_residents_of_a_single_rank(ranks) -> None:  # noqa: ANN001
    residents = [[[500, 501, 502], [1, 0, 2, 0]]]
    results = ranks(1).run(exchange, [list(range(5))], [EXPERTS[0]], residents)
    assert results[0]["arrived"].tolist() == [1, 3, 500, 2, 501, 502, 0, 4]
    assert results[0]["counts"].tolist() == [3, 0, 3, 2]
    check_residents(results[0], [500, 501, 502])
    check_returned(results, [list(range(5))])


@pytest.mark.parametrize("layout", [{}, {"expert_model_parallel_size": 2}], ids=["EP1", "EP2"])
def test_two_sets_of_residents_are_answered_apart(ranks, layout: dict) -> None:  # noqa: ANN001
    world_size = 2 if layout else 1
    residents = RESIDENTS if layout else [[[500, 501, 502], [1, 0, 2, 0]]]
    rows, experts = list(ROWS)[:world_size], list(EXPERTS)[:world_size]
    results = ranks(world_size).run(exchange, rows, experts, residents, 2, layout=layout)
    for rank, result in enumerate(results):
        assert len(result["residents"]) == 2
        check_residents(result, residents[rank][0])
    check_returned(results, rows)


@pytest.mark.parametrize("world_size", [1, 4])
def test_residents_without_any_travelling_row(ranks, world_size: int) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2} if world_size == 4 else {}
    residents = RESIDENTS if world_size == 4 else [[[500, 501, 502], [1, 0, 2, 0]]]
    results = ranks(world_size).run(exchange, [[], []], [[], []], residents, layout=layout)
    for rank, result in enumerate(results):
        own = residents[rank % len(residents)][0]
        assert result["arrived"].tolist() == own
        assert result["returned"].tolist() == []
        check_residents(result, own)


def test_one_expert_per_rank_takes_residents_behind_its_rows(ranks) -> None:  # noqa: ANN001
    """Nothing is regrouped then."""
    rows, experts = [[0, 1], [2], [], [3, 4]], [[3, 1], [1], [], [0, 1]]
    residents = [[[500], [1]], [[600, 601], [2]], [[700], [1]], [[], [0]]]
    layout = {"expert_model_parallel_size": 4}
    results = ranks(4).run(exchange, rows, experts, residents, layout=layout)
    arrived = [[3, 500], [1, 2, 4, 600, 601], [700], [0]]
    for rank, result in enumerate(results):
        assert result["arrived"].tolist() == arrived[rank]
        check_residents(result, residents[rank][0])
    check_returned(results, rows)


def test_residents_of_sharded_experts_are_evaluated_on_every_shard(ranks) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    rows, experts = [[0, 1], [100], [200], []], [[2, 1], [1], [1], []]
    results = ranks(4).run(exchange, rows, experts, RESIDENTS, layout=layout)
    for rank, result in enumerate(results):
        arrived = [[500, 1, 200, 100, 501, 502], [0, 600]]
        assert result["arrived"].tolist() == arrived[rank // 2]
        assert result["counts"].tolist() == [[1, 5], [1, 1]][rank // 2]
        check_residents(result, RESIDENTS[rank // 2][0], num_shards=2)
    check_returned(results, rows)
