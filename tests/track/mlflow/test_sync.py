"""Replaying a run directory into a store: what is missing arrives, once; the table says so."""

import fcntl
import json
import math
import os
import sqlite3
import subprocess
import sys

import pytest
from mlflow import MlflowClient
from mlflow.entities import Metric
from typer.testing import CliRunner

from vqmoe_megatron.cli import app
from vqmoe_megatron.cli.mlflow_sync import COUNTS
from vqmoe_megatron.config import RunConfig, TrackingConfig
from vqmoe_megatron.config.recipe import save_recipe
from vqmoe_megatron.rundir.file_lock import LockWait, wait_for_lock
from vqmoe_megatron.rundir.status import is_alive, write_status
from vqmoe_megatron.track.metrics_log import MetricsLog
from vqmoe_megatron.track.mlflow import store as mlflow_store
from vqmoe_megatron.track.mlflow.errors import MlflowUnavailable
from vqmoe_megatron.track.mlflow.record import open_record
from vqmoe_megatron.track.mlflow.sync import sync_run


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("sync")


@pytest.fixture(scope="module")
def store(runs_dir):
    return MlflowClient(f"sqlite:///{runs_dir}/mlflow.db")


def make_run(run_dir, state="completed", **tracking):
    """A run directory as training leaves it that never reached a store."""
    save_recipe(RunConfig(tracking=TrackingConfig(**tracking)), run_dir / "run_config.yaml")
    with MetricsLog(run_dir) as log:
        for step in (10, 20, 30):
            record = {"iteration": step, "timestamp_ms": 1000 * step, "loss": 1 / step}
            log.append(record | ({"val/loss": math.inf} if step == 20 else {"grad_norm": math.nan}))
    with MetricsLog(run_dir, "system_metrics.jsonl") as log:
        log.append({"iteration": 20, "timestamp_ms": 20_000, "system/memory_used_bytes": 5})
    write_status(run_dir, state, 30, "because")
    (run_dir / "plots").mkdir()
    (run_dir / "plots" / "loss.png").write_bytes(b"a plot")
    open_record(run_dir, print).note_tags({"attempt": "1", "attempt/01/slurm_job_id": "77"})
    return run_dir


def history(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def test_a_run_that_never_reached_a_store_arrives_whole_and_once(runs_dir, store):
    run_dir = make_run(runs_dir / "offline", parent_run_id="f" * 32, run_name="named")
    first = sync_run(run_dir, None)
    counts = (first.num_points, first.num_there, first.num_sent, first.num_differing)
    assert counts == (7, 0, 7, 0)
    assert first.num_files_sent == 2 and first.num_params_sent > 50 and first.num_tags_sent == 2
    run = store.get_run(first.run_id)
    assert run.info.status == first.status == "FINISHED" and run.info.run_name == "named"
    assert (run.info.start_time, run.info.end_time) == (10_000, 30_000)
    assert run.data.tags["mlflow.parentRunId"] == "f" * 32
    assert run.data.tags["attempt/01/slurm_job_id"] == "77"
    assert history(store, first.run_id, "loss") == [(step, 1 / step) for step in (10, 20, 30)]
    times = [point.timestamp for point in store.get_metric_history(first.run_id, "loss")]
    assert times == [10_000, 20_000, 30_000]
    assert all(math.isnan(value) for _, value in history(store, first.run_id, "grad_norm"))
    assert {file.path for file in store.list_artifacts(first.run_id)} == {
        "plots",
        "run_config.yaml",
    }

    again = sync_run(run_dir, None)
    assert again.run_id == first.run_id and again.num_there == again.num_points == 7
    assert (again.num_sent, again.num_params_sent, again.num_tags_sent) == (0, 0, 0)
    assert (again.num_files_sent, again.num_differing, again.num_only_there) == (0, 0, 0)
    (run_dir / "mlflow.json").unlink()  # the id is also in status.json of a run that had one
    write_status(run_dir, "completed", 30, "because", first.run_id)
    assert sync_run(run_dir, None).run_id == first.run_id


def test_only_holes_are_filled_and_what_differs_is_counted(runs_dir, store):
    run_dir = make_run(runs_dir / "holes", "requeue")
    run_id = sync_run(run_dir, None).run_id
    assert store.get_run(run_id).info.status == "KILLED"
    with MetricsLog(run_dir) as log:
        log.truncate_after(20)
        log.append({"iteration": 30, "loss": 5.0, "learning_rate": 0.1})  # trained again
        log.append({"iteration": 40, "loss": 0.5})
    store.log_batch(run_id, [Metric("loss", 0.25, 1, 50)])  # discarded: only the store has it
    write_status(run_dir, "failed", 40, "a reason")
    result = sync_run(run_dir, None)
    assert (result.num_points, result.num_there, result.num_sent) == (8, 6, 2)
    assert (result.num_differing, result.num_only_there) == (1, 2)  # loss of 30; loss 50, grad 30
    assert result.status == store.get_run(run_id).info.status == "FAILED"
    steps = [step for step, _ in history(store, run_id, "loss")]
    assert sorted(steps) == [10, 20, 30, 40, 50]
    assert (30, 1 / 30) in history(store, run_id, "loss")


def test_a_killed_run_is_killed_and_a_living_one_is_left_alone(runs_dir, store):
    run_dir = make_run(runs_dir / "killed", "running")
    assert not is_alive(run_dir)
    assert sync_run(run_dir, None).status == "KILLED"
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time\n"
            "file = open(sys.argv[1], 'w')\n"
            "fcntl.lockf(file, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\n"
            "time.sleep(60)\n",
            str(run_dir / ".lock"),
        ],
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n" and is_alive(run_dir)
        with MetricsLog(run_dir) as log:
            log.append({"iteration": 40, "loss": 0.5})
        result = sync_run(run_dir, None)
        assert result.is_running and result.num_sent == 0
    finally:
        holder.kill()
        holder.wait()
    assert sync_run(run_dir, None).num_sent == 1


def test_another_store_gets_a_whole_run_of_its_own(runs_dir, store, tmp_path):
    run_dir = make_run(runs_dir / "elsewhere")
    here = sync_run(run_dir, None)
    other = f"sqlite:///{tmp_path}/other.db"
    there = sync_run(run_dir, other)
    assert there.run_id != here.run_id and there.num_sent == 7
    assert sync_run(run_dir, other).num_sent == sync_run(run_dir, None).num_sent == 0
    content = json.loads((run_dir / "mlflow.json").read_text())
    assert set(content["runs"].values()) == {here.run_id, there.run_id}


def test_records_of_earlier_releases_get_the_time_of_the_file(runs_dir, store):
    run_dir = make_run(runs_dir / "earlier")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["timestamp_ms"]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = sync_run(run_dir, None)
    changed_ms = (run_dir / "metrics.jsonl").stat().st_mtime_ns // 1_000_000
    points = store.get_metric_history(result.run_id, "loss")
    assert [point.timestamp for point in points] == [changed_ms] * 3


def test_the_command_prints_a_table_and_says_what_is_wrong(runs_dir, store, tmp_path):
    run_dir = make_run(tmp_path / "runs" / "one")
    uri = f"sqlite:///{runs_dir}/mlflow.db"
    done = CliRunner().invoke(app, ["mlflow-sync", str(run_dir), "--uri", uri])
    assert done.exit_code == 0, done.output
    header, row = done.stdout.splitlines()[:2]
    assert "there" in header and "only there" in header
    assert row.split()[2:5] == ["7", "0", "7"] and row.split()[-1] == "FINISHED"

    down = ["mlflow-sync", str(run_dir), "--uri", "http://127.0.0.1:9"]
    failed = CliRunner().invoke(app, down)
    assert failed.exit_code == 1
    expected = f"error: {run_dir}: MLflow at http://127.0.0.1:9: connection refused: no server"
    assert failed.stderr.startswith(expected) and failed.stderr.count("\n") == 1
    with pytest.raises(MlflowUnavailable):
        sync_run(run_dir, "http://127.0.0.1:9")

    (tmp_path / "file").touch()
    for mistyped, what in (("x", "does not exist"), ("file", "is a file")):
        refused = CliRunner().invoke(app, ["mlflow-sync", str(run_dir), str(tmp_path / mistyped)])
        assert isinstance(refused.exception, ValueError)  # exit code 2, as every refusal
        assert f"is no run directory: it {what}; give train" in str(refused.exception)
        assert refused.stdout == ""
    secret = CliRunner().invoke(app, ["mlflow-sync", str(run_dir), "--uri", "http://u:pw@host"])
    assert "MLFLOW_TRACKING_PASSWORD" in str(secret.exception)
    assert "pw" not in str(secret.exception)


def test_a_lock_that_stays_is_named_and_given_up(runs_dir, store, tmp_path, monkeypatch):
    """Left over by a stopped process, or by a program that knows nothing of us."""
    run_dir = make_run(tmp_path / "one")
    database = tmp_path / "own.db"
    with (tmp_path / "own.db.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        monkeypatch.setattr(
            mlflow_store,
            "wait_for_lock",
            lambda file, wait: wait_for_lock(file, wait=LockWait(1.0)),
        )
        failed = CliRunner().invoke(
            app, ["mlflow-sync", str(run_dir), "--uri", f"sqlite:///{database}"]
        )
    assert failed.exit_code == 1
    said = f"the lock {database}.lock has been held by process {os.getpid()} on "
    assert said in failed.stderr and "for 1 s; wait for that process or end it" in failed.stderr
    assert failed.stderr.count("\n") == 1 and not database.exists()


def test_a_database_that_is_locked_says_by_whom(runs_dir, store, tmp_path):
    run_dir = make_run(tmp_path / "two")
    uri = f"sqlite:///{runs_dir}/mlflow.db?timeout=0.2"
    connection = sqlite3.connect(runs_dir / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        failed = CliRunner().invoke(app, ["mlflow-sync", str(run_dir), "--uri", uri])
    finally:
        connection.execute("ROLLBACK")
        connection.close()
    assert failed.exit_code == 1
    said = f"MLflow at {uri}: the database is locked by process {os.getpid()} on "
    assert said in failed.stderr and failed.stderr.count("\n") == 1


def test_a_damaged_run_does_not_stop_the_others(runs_dir, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "d"):
        make_run(tmp_path / name)
    (tmp_path / "b" / "status.json").write_text("{")
    (tmp_path / "c").mkdir()  # its run failed before it began
    uri = f"sqlite:///{runs_dir}/mlflow.db"
    done = CliRunner().invoke(app, ["mlflow-sync", "a", "b", "c", "d", "--uri", uri])
    assert done.exit_code == 1, done.exception
    _, *rows = done.stdout.splitlines()
    assert [row.split()[0] for row in rows[:3]] == ["a", "d", "b"]
    assert [row.split()[-1] for row in rows[:2]] == ["FINISHED", "FINISHED"]
    assert "failed: b/status.json is not a run status" in rows[2]
    assert "failed: c is no run directory: it holds no run_config.yaml" in done.stdout
    reasons = [line.split(": ")[:2] for line in done.stderr.splitlines()]
    assert reasons == [["error", "b"], ["error", "c"]]
    assert sync_run(tmp_path / "d", uri).num_sent == 0


def test_the_lock_probe_believes_a_state_it_cannot_check(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError("no locks here")

    write_status(tmp_path, "running", 1, "training")
    (tmp_path / ".lock").touch()
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    assert is_alive(tmp_path)
    write_status(tmp_path, "requeue", 1, "signal")
    assert not is_alive(tmp_path)


def test_the_help_explains_every_count_of_the_table():
    shown = CliRunner().invoke(app, ["mlflow-sync", "--help"]).output
    explained = shown[shown.index("The table counts") : shown.index("A database that")]
    assert [name for name in COUNTS if name not in " ".join(explained.split())] == []
