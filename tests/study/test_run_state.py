"""The state of a run: from status.json, the lock of its directory and Slurm's queue."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vqmoe_megatron.rundir.status import write_status
from vqmoe_megatron.study.run_state import last_metrics, run_state
from vqmoe_megatron.study.study import load_study

HOLD_LOCK = (
    "import sys, time; from pathlib import Path;"
    "from vqmoe_megatron.rundir.run_directory import RunDirectory;"
    "lock = RunDirectory(Path(sys.argv[1])).lock(); print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def run(write_study):
    return load_study(write_study()).runs[0]


def test_a_run_that_never_started_waits(run) -> None:
    assert run_state(run).state == "waiting"
    assert run_state(run, "7_0 PENDING").state == "queued"
    assert run_state(run, "7_0 RUNNING").state == "running"
    assert not run.run_dir.exists()  # looking leaves nothing behind


@pytest.mark.parametrize(
    ("status", "iteration", "expected"),
    [
        ("completed", 8, "finished"),
        ("completed", 5, "stopped"),  # train.exit_interval
        ("requeue", 5, "stopped"),
        ("failed", 5, "failed"),
        ("running", 5, "lost"),  # nobody holds the lock
    ],
)
def test_by_status(status, iteration, expected, run) -> None:
    write_status(run.run_dir, status, iteration, "why")
    state = run_state(run)
    assert (state.state, state.iteration, state.train_iters) == (expected, iteration, 8)
    assert state.is_finished == (expected == "finished")
    assert not (run.run_dir / ".lock").exists()  # who asks leaves nothing


@pytest.mark.parametrize(("status", "without"), [("running", "lost"), ("completed", "stopped")])
def test_a_held_lock_means_running(status, without, run) -> None:
    write_status(run.run_dir, status, 2, "training")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(run.run_dir)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert run_state(run).state == "running"
    finally:
        holder.kill()
        holder.communicate()
    assert run_state(run).state == without


def test_the_queue_outranks_an_old_failure_but_not_the_end(run) -> None:
    write_status(run.run_dir, "failed", 5, "node died")
    assert run_state(run, "7_0 PENDING").state == "queued"
    write_status(run.run_dir, "completed", 8, "done")
    assert run_state(run, "7_0 COMPLETING").state == "finished"


def test_a_damaged_status_is_a_failure_that_names_the_file(run) -> None:
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "status.json").write_text("{")
    assert run_state(run).state == "failed" and "status.json" in run_state(run).reason


def test_the_latest_of_each_metric_is_found(tmp_path) -> None:
    log = tmp_path / "metrics.jsonl"
    rows = [{"iteration": i, "loss": 5.0 - i / 1e4, "tokens_per_second": i} for i in range(4000)]
    rows[3990]["val/loss"] = 4.25
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 4000, "lo')
    assert log.stat().st_size > 2 * 65536
    assert last_metrics(log) == {
        "iteration": 3999,
        "loss": rows[-1]["loss"],
        "tokens_per_second": 3999,
        "val/loss": 4.25,
    }
    assert last_metrics(tmp_path / "none.jsonl") == {}
