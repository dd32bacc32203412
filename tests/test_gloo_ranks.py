"""The test harness itself: results come back, and failures show."""

from __future__ import annotations

import pytest
import torch
from gloo_ranks import RanksFailed, run_ranks


def add_up(offset: int, table: dict) -> dict:
    total = torch.tensor([torch.distributed.get_rank() + offset])
    torch.distributed.all_reduce(total)
    return {"total": total, "draw": torch.rand(1), "table": table}


def fail_on_rank_1(how: str) -> None:
    if torch.distributed.get_rank() == 1:
        if how == "raise":
            raise ValueError("rank one has had enough")
        while True:
            pass
    torch.distributed.barrier()


@pytest.mark.distributed
def test_results_come_back_in_rank_order(ranks) -> None:  # noqa: ANN001
    for found in ranks(4).run(add_up, 10, {"kept": [1, "two"]}):
        assert found["total"].tolist() == [46]
        assert found["table"] == {"kept": [1, "two"]}
    again = ranks(4).run(add_up, 10, {})
    assert again[0]["draw"] == ranks(4).run(add_up, 10, {})[3]["draw"]  # seeded alike
    assert again[0]["draw"] != ranks(4).run(add_up, 10, {}, seed=5)[0]["draw"]


@pytest.mark.distributed
def test_the_failing_ranks_output_is_shown() -> None:
    with pytest.raises(RanksFailed, match="(?s)rank 1 ended with 1.*rank one has had enough"):
        run_ranks(2, fail_on_rank_1, "raise")


@pytest.mark.distributed
def test_a_hanging_rank_ends_in_time(ranks) -> None:  # noqa: ANN001
    pool = ranks(2)
    pool.run(add_up, 0, {})  # started
    pool = ranks(2)  # another, where that call was the last that the world could take
    with pytest.raises(RanksFailed, match="did not answer in time"):
        pool.run(fail_on_rank_1, "hang", timeout_seconds=0.5)
    assert pool.is_closed
    assert not ranks(2).is_closed  # a fresh world
