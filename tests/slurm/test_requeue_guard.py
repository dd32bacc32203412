"""Which attempts are queued again, decided on the files of a run directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from shell_run import bash

from vqmoe_megatron.rundir.status import write_status


def make_run(run_dir: Path, state: str | None, saved: int, reason: str = "why") -> None:
    if state is not None:
        write_status(run_dir, state, saved, reason)
    if saved:
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        tracker = run_dir / "checkpoints" / "latest_checkpointed_iteration.txt"
        tracker.write_text(f"{saved}\n")


def decide(run_dir: Path, start: int, restart: int = 0, mark: str = "another") -> str:
    done = bash(f"decide_requeue '{run_dir}' 7 {start} '{mark}' {restart} 3", "requeue_guard")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("state", "start", "saved", "restart", "decision"),
    [
        ("completed", 0, 60, 0, "done iteration 60: why"),
        ("completed", 60, 60, 3, "done iteration 60: why"),
        ("requeue", 0, 14, 0, "requeue iteration 0 -> 14: why"),
        ("requeue", 14, 14, 0, "requeue iteration 14 -> 14: why"),  # asked to; bounded at the start
        ("requeue", 0, 0, 0, "requeue iteration 0 -> 0: why"),
        ("requeue", 0, 14, 2, "requeue iteration 0 -> 14: why"),
        ("requeue", 0, 14, 3, "give-up restart 3 was the last that VQMOE_MAX_RESTARTS=3"),
        ("running", 10, 20, 0, "requeue the ranks were killed after iteration 10 -> 20"),
        ("running", 10, 10, 0, "give-up no progress"),
        ("failed", 0, 14, 0, "give-up the run has state 'failed': why"),
    ],
)
def test_decision(tmp_path, state, start, saved, restart, decision) -> None:
    make_run(tmp_path, state, saved)
    assert decide(tmp_path, start, restart).startswith(decision)


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


def test_a_status_that_the_attempt_did_not_write_counts_for_nothing(tmp_path) -> None:
    make_run(tmp_path, "requeue", 14)
    mark = bash(f"status_mark '{tmp_path}'", "requeue_guard").stdout.strip()
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


@pytest.mark.parametrize(
    "reason", ['a "quoted" word', "comma, colon: 5", "back\\slash", "tab\there"]
)
def test_reason_is_read_from_json(tmp_path, reason) -> None:
    make_run(tmp_path, "failed", 0, reason)
    answer = decide(tmp_path, 0)
    assert answer.startswith("give-up the run has state 'failed': ")
    assert reason.split()[0].strip('"')[:4] in answer


def begin(run_dir: Path, job: str, restart: int, most: int = 9, idle: int = 2):
    return bash(f"begin_attempt '{run_dir}' {job} {restart} {most} {idle}", "requeue_guard")


def test_attempts_that_begin_at_the_same_iteration_are_bounded(tmp_path) -> None:
    assert begin(tmp_path, "7", 0).returncode == 0
    assert begin(tmp_path, "7", 1).returncode == 0
    refused = begin(tmp_path, "7", 2)
    assert refused.returncode == 1
    assert refused.stdout.startswith("giving up: 2 attempts of job 7 began at iteration 0")
    make_run(tmp_path, None, 10)  # progress frees it
    assert begin(tmp_path, "7", 3).returncode == 0
    lines = (tmp_path / "slurm_attempts.tsv").read_text().splitlines()
    assert lines == ["7\t0\t0", "7\t1\t0", "7\t3\t10"]


def test_another_job_in_the_same_directory_starts_with_a_clean_record(tmp_path) -> None:
    assert begin(tmp_path, "7", 0).returncode == 0
    assert begin(tmp_path, "7", 1).returncode == 0
    assert begin(tmp_path, "8", 0).returncode == 0


def test_a_job_of_the_same_number_on_a_cluster_that_began_anew(tmp_path) -> None:
    for _ in range(2):
        assert begin(tmp_path, "7", 0).returncode == 0
        assert begin(tmp_path, "7", 1).returncode == 0
    assert begin(tmp_path, "7", 2).returncode == 1


def test_lines_of_an_earlier_job_of_that_number_do_not_count(tmp_path) -> None:
    assert begin(tmp_path, "7", 0, idle=3).returncode == 0  # ended there
    for restart in range(3):
        assert begin(tmp_path, "7", restart, idle=3).returncode == 0
    assert begin(tmp_path, "7", 3, idle=3).stdout.startswith("giving up: 3 attempts of job 7")


def test_restarts_are_bounded(tmp_path) -> None:
    assert begin(tmp_path, "7", 2, most=2).returncode == 0
    refused = begin(tmp_path, "7", 3, most=2)
    assert refused.returncode == 1
    assert "restart 3 is more than VQMOE_MAX_RESTARTS=2 allows" in refused.stdout
    assert len((tmp_path / "slurm_attempts.tsv").read_text().splitlines()) == 1


@pytest.mark.parametrize(("text", "iteration"), [("0000080\n", 80), ("100", 100), ("junk", 0)])
def test_saved_iteration(tmp_path, text, iteration) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(text)
    assert bash(f"saved_iteration '{tmp_path}'", "requeue_guard").stdout == f"{iteration}\n"
