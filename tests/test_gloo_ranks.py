"""The test harness itself: results come back, and failures show."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gloo_ranks
import pytest
import torch
from gloo_ranks import ROOT, RanksFailed, run_ranks

HOLDS_A_POOL = """
import sys
import time
from pathlib import Path

def hang(folder):
    Path(folder, "hangs_here").touch()
    time.sleep(600)

def still(folder):
    Path(folder, "hangs_here").touch()

if __name__ == "__main__":
    from gloo_ranks import RankPool

    pool = RankPool(2)
    job = {"hangs": hang, "stands still": still}[sys.argv[1]]
    print(pool.folder, *[rank.pid for rank in pool.ranks], flush=True)
    pool.run(job, str(pool.folder))
    time.sleep(600)
"""


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


def state(pid: str) -> str:
    """R, S, T and so on, as ``ps`` shows it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="a process is looked for in /proc")
@pytest.mark.parametrize("job", ["hangs", "stands still"])
def test_ranks_end_with_the_process_that_started_them(job, tmp_path) -> None:  # noqa: ANN001
    """Killed in the middle of a job that would not end by itself, or between two; their files go,
    too."""
    script = tmp_path / "holds_a_pool.py"
    script.write_text(HOLDS_A_POOL)
    holder = subprocess.Popen(
        [sys.executable, script, job],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        stdout=subprocess.PIPE,
        text=True,
    )
    folder, *pids = holder.stdout.readline().split()
    deadline = time.monotonic() + 60
    while not list(Path(folder).glob("hangs_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    while job == "stands still" and any(state(pid) != "T" for pid in pids):
        assert time.monotonic() < deadline, [state(pid) for pid in pids]
        time.sleep(0.05)
    holder.kill()
    holder.wait()
    left = [Path(folder), *(Path(f"/proc/{pid}") for pid in pids)]  # whoever ends last tidies up
    while any(path.exists() for path in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert len(pids) == 2 and not Path(folder).exists()


def rank_number() -> int:
    return torch.distributed.get_rank()


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="threads are counted in /proc")
def test_a_worn_world_finishes_its_test_and_the_next_one_gets_another(ranks, monkeypatch) -> None:  # noqa: ANN001
    pool = ranks(2)
    monkeypatch.setattr(gloo_ranks, "MAX_THREADS", 0)
    assert pool.run(rank_number) == [0, 1] and pool.is_worn
    assert pool.run(rank_number) == [0, 1]
    assert ranks(2) is not pool and pool.is_closed
