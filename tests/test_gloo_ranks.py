"""The test harness itself: results come back, failures show, and an empty distributed leg is
red."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gloo_ranks import RanksFailed, run_ranks

HERE = Path(__file__).resolve().parent


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
    with pytest.raises(RanksFailed, match="did not answer in time"):
        pool.run(fail_on_rank_1, "hang", timeout_seconds=0.5)
    assert pool.is_closed
    assert not ranks(2).is_closed  # a fresh world


def session(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A pytest session over this conftest and one passing test that is not distributed."""
    shutil.copy(HERE / "conftest.py", folder / "conftest.py")
    (folder / "test_one.py").write_text("def test_one():\n    pass\n")
    (folder / "pytest.ini").write_text(
        "[pytest]\nmarkers = distributed: starts ranks\ntestpaths = .\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


def test_a_full_session_without_its_distributed_leg_fails(tmp_path: Path) -> None:
    for arguments in ([], ["."]):
        finished = session(tmp_path, *arguments)
        assert finished.returncode == 1, finished.stdout
        assert "only 0 tests marked 'distributed' passed" in finished.stdout


@pytest.mark.parametrize("arguments", [["-k", "one"], ["test_one.py"], ["-m", "not distributed"]])
def test_a_partial_session_is_not_judged(tmp_path: Path, arguments: list[str]) -> None:
    finished = session(tmp_path, *arguments)
    assert finished.returncode == 0, finished.stdout
