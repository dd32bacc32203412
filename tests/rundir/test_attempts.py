"""Which attempts are queued again, decided on the files of a run directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqmoe_megatron.rundir.attempts import (
    Attempt,
    Start,
    begin_attempt,
    decide_requeue,
    status_mark,
)
from vqmoe_megatron.rundir.status import write_status
from vqmoe_megatron.rundir.tracker import saved_iteration


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


def make_run(run_dir: Path, state: str | None, saved: int, reason: str = "why") -> None:
    if state is not None:
        write_status(run_dir, state, saved, reason)
    if saved:
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
        tracker.write_text(f"{saved}\n")


def decide(run_dir: Path, start: int, restart: int = 0, mark: str = "another") -> str:
    return str(decide_requeue(Attempt(run_dir, "7", restart, 3), Start(start, mark)))


@pytest.mark.parametrize(
    ("state", "start", "saved", "restart", "decision"),
    [
        ("completed", 0, 60, 0, "done iteration 60: why"),
        ("completed", 60, 60, 3, "done iteration 60: why"),
        ("requeue", 0, 14, 0, "requeue iteration 0 -> 14: why"),
        ("requeue", 14, 14, 0, "requeue iteration 14 -> 14: why"),  # asked to; bounded at the start
        ("requeue", 0, 0, 0, "requeue iteration 0 -> 0: why"),
        ("requeue", 0, 14, 2, "requeue iteration 0 -> 14: why"),
        (
            "requeue",
            0,
            14,
            3,
            "give-up restart 3 was the last that VQMOE_MAX_RESTARTS=3 allows (state requeue: why)",
        ),
        ("running", 10, 20, 0, "requeue the ranks were killed after iteration 10 -> 20"),
        (
            "running",
            10,
            10,
            0,
            "give-up no progress: the attempt began at iteration 10 and its newest checkpoint is "
            "of 10 (state running: why)",
        ),
        ("failed", 0, 14, 0, "give-up the run has state 'failed': why"),
    ],
)
def test_decision(tmp_path, state, start, saved, restart, decision) -> None:
    make_run(tmp_path, state, saved)
    assert decide(tmp_path, start, restart) == decision


@pytest.mark.parametrize(
    "lost",
    [
        "RuntimeError: [../gloo/transport/tcp/pair.cc:1] Connection reset by peer",
        "RuntimeError: [../gloo/unbound_buffer.cc:81] Timed out waiting 600000ms for recv",
        "RuntimeError: Application timeout caused pair closure",
        "RuntimeError: connect: No route to host",
        "DistStoreError: wait timeout after 600000ms",
    ],
)
@pytest.mark.parametrize(("saved", "decision"), [(14, "requeue the ranks were"), (0, "give-up no")])
def test_a_rank_that_lost_its_peer_was_not_the_cause(tmp_path, lost, saved, decision) -> None:
    why = f"rank 0: {lost}"
    make_run(tmp_path, "failed", saved, why)
    assert decide(tmp_path, 0).startswith(decision)


def test_a_save_that_failed_elsewhere_is_no_killed_rank(tmp_path) -> None:
    """A full disk would fill again: no attempt is queued for want of the other rank's own word."""
    make_run(tmp_path, "failed", 14, "rank 0: SaveFailed: another rank could not write its part")
    assert decide(tmp_path, 0).startswith("give-up the run has state 'failed'")


def test_a_status_that_the_attempt_did_not_write_counts_for_nothing(tmp_path) -> None:
    make_run(tmp_path, "requeue", 14)
    mark = status_mark(tmp_path)
    assert decide(tmp_path, 0, mark=mark) == "give-up the ranks ended before they wrote a status"
    make_run(tmp_path, "requeue", 14)  # the same words, written again
    assert decide(tmp_path, 0, mark=mark).startswith("requeue ")


def test_the_status_of_another_job_is_not_this_one_s(tmp_path, monkeypatch) -> None:
    """Two jobs in one run directory: the second finds it locked, and must not wait for its end."""
    for job, decision in (("7", "requeue the ranks"), ("6", "give-up job 6 trains in this run")):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        make_run(tmp_path, "running", 20)
        assert decide(tmp_path, 10).startswith(decision)


def test_no_status_at_all(tmp_path) -> None:
    assert decide(tmp_path, 0, mark="none").startswith("give-up the ranks ended before")
    assert decide(tmp_path, 0, mark="1:2") == f"give-up {tmp_path / 'status.json'} is gone"


def test_a_damaged_status_says_so(tmp_path) -> None:
    (tmp_path / "status.json").write_text('{"state": "requeue"')
    assert "status.json is not a run status" in decide(tmp_path, 0)
    assert decide(tmp_path, 0).startswith("give-up ")


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ('a "quoted" word', 'a "quoted" word'),
        ("comma, colon: 5", "comma, colon: 5"),
        ("back\\slash", "back\\slash"),
        ("two\nlines", "two lines"),  # the shell reads one
    ],
)
def test_a_reason_is_told_as_it_was_recorded(tmp_path, reason, shown) -> None:
    make_run(tmp_path, "failed", 0, reason)
    assert decide(tmp_path, 0) == f"give-up the run has state 'failed': {shown}"


def begin(run_dir: Path, job: str, restart: int, most: int = 9, idle: int = 2) -> str:
    return str(begin_attempt(Attempt(run_dir, job, restart, most), idle))


def notes(run_dir: Path) -> list[str]:
    return (run_dir / "slurm_attempts.tsv").read_text().splitlines()


def test_attempts_that_begin_at_the_same_iteration_are_bounded(tmp_path) -> None:
    assert begin(tmp_path, "7", 0) == begin(tmp_path, "7", 1) == "begin 0 none"
    assert begin(tmp_path, "7", 2) == (
        "give-up 2 attempts of job 7 began at iteration 0 and left no newer checkpoint "
        "(VQMOE_MAX_IDLE_ATTEMPTS=2)"
    )
    make_run(tmp_path, "running", 10)  # progress frees it
    assert begin(tmp_path, "7", 3) == f"begin 10 {status_mark(tmp_path)}"
    assert notes(tmp_path) == ["7\t0\t0", "7\t1\t0", "7\t3\t10"]


def test_another_job_in_the_same_directory_starts_with_a_clean_record(tmp_path) -> None:
    for job, restart in (("7", 0), ("7", 1), ("8", 0), ("7_2", 0)):
        assert begin(tmp_path, job, restart).startswith("begin ")


def test_a_job_of_the_same_number_on_a_cluster_that_began_anew(tmp_path) -> None:
    for _ in range(2):
        assert begin(tmp_path, "7", 0).startswith("begin ")
        assert begin(tmp_path, "7", 1).startswith("begin ")
    assert begin(tmp_path, "7", 2).startswith("give-up ")


def test_lines_of_an_earlier_job_of_that_number_do_not_count(tmp_path) -> None:
    assert begin(tmp_path, "7", 0, idle=3).startswith("begin ")  # ended there
    for restart in range(3):
        assert begin(tmp_path, "7", restart, idle=3).startswith("begin ")
    assert begin(tmp_path, "7", 3, idle=3).startswith("give-up 3 attempts of job 7")


def test_restarts_are_bounded(tmp_path) -> None:
    assert begin(tmp_path, "7", 2, most=2).startswith("begin ")
    refused = begin(tmp_path, "7", 3, most=2)
    assert refused == "give-up restart 3 is more than VQMOE_MAX_RESTARTS=2 allows"
    assert len(notes(tmp_path)) == 1


def test_a_note_that_a_dead_node_left_half_counts_for_nothing(tmp_path) -> None:
    (tmp_path / "slurm_attempts.tsv").write_text("7\t0\t0\n7\t1")
    assert begin(tmp_path, "7", 2) == "begin 0 none"
    assert notes(tmp_path) == ["7\t0\t0", "7\t1", "7\t2\t0"]
    assert begin(tmp_path, "7", 3).startswith("give-up 2 attempts")


def test_a_directory_that_takes_no_note_starts_no_attempt(tmp_path) -> None:
    with pytest.raises(ValueError, match="slurm_attempts.tsv cannot be written: No such file"):
        begin(tmp_path / "none", "7", 0)


@pytest.mark.parametrize("job", ["", "7 8", "7\t0"])
def test_a_job_is_one_word(tmp_path, job) -> None:
    with pytest.raises(ValueError, match="must be a job's name"):
        Attempt(tmp_path, job, 0, 1)


@pytest.mark.parametrize(("text", "iteration"), [("0000080\n", 80), ("100", 100), ("junk", 0)])
def test_saved_iteration(tmp_path, text, iteration) -> None:
    assert saved_iteration(tmp_path) == 0
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(text)
    assert saved_iteration(tmp_path) == iteration
