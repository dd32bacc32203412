"""MLflow tracking against real stores: SQLite files, a real server, and servers that misbehave."""

import fcntl
import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.rundir.file_lock import LockWait
from vqmoe_megatron.rundir.status import STATES
from vqmoe_megatron.rundir.waiting import tell_nobody
from vqmoe_megatron.track.metrics_log import MetricsLog
from vqmoe_megatron.track.mlflow import tracker as mlflow_tracker
from vqmoe_megatron.track.mlflow.record import open_record
from vqmoe_megatron.track.mlflow.store import OUTCOME_OF_STATE
from vqmoe_megatron.track.mlflow.tracker import MlflowTracker
from vqmoe_megatron.track.tracker import TrackedRun

SLOWEST_CALL_S = 0.05


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """One folder of run directories, so that the module creates its database once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def store(runs_dir):
    return MlflowClient(f"sqlite:///{runs_dir}/mlflow.db")


def history(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def open_tracker(run_dir, uri=None, **options):
    return MlflowTracker(uri, "exp", None, run_dir, open_record(run_dir, print), **options)


def log_losses(tracker, losses):
    """Append one record per (step, loss) to the run's log and say so; the slowest call, seconds."""
    slowest = 0.0
    with MetricsLog(tracker.run_dir) as log:
        for step, loss in losses:
            log.append({"iteration": step, "loss": loss})
            start = time.perf_counter()
            tracker.metrics_logged({})
            slowest = max(slowest, time.perf_counter() - start)
    return slowest


def test_a_run_arrives_whole_in_the_default_store(runs_dir, store):
    run_dir, notices = runs_dir / "whole", []
    run_dir.mkdir()
    (run_dir / "run_config.yaml").write_text("a: 1\n")
    tracker = open_tracker(run_dir, report=notices.append)
    run_id = tracker.run_id
    assert run_id is not None
    params = {f"model.p{i}": i for i in range(120)} | {"model.long": "x" * 6001}
    tracker.log_params(params)
    layers = {f"vq/layer_{i:02d}/dead_codes": i for i in range(1, 1101)}
    with MetricsLog(run_dir) as log:
        log.append({"iteration": 10, "timestamp_ms": 1234, "loss": 0.1 + 0.2, **layers})
        tracker.metrics_logged({})
        log.append({"iteration": 20, "loss": math.nan, "grad_norm": math.inf})
    tracker.log_artifact(run_dir / "run_config.yaml", "config")
    tracker.set_tags({"job": 7, "long": "y" * 8001})
    tracker.finish("completed")

    run = store.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "whole"
    assert len(run.data.params) == 121 and run.data.params["model.p7"] == "7"
    assert len(run.data.params["model.long"]) == 6000 and len(run.data.tags["long"]) == 8000
    assert run.data.tags["job"] == "7" and run.data.tags["run_dir"] == str(run_dir)
    (_, first), (step, second) = history(store, run_id, "loss")
    assert first == 0.1 + 0.2 and step == 20 and math.isnan(second)
    assert [point.timestamp for point in store.get_metric_history(run_id, "loss")][0] == 1234
    assert run.data.metrics["vq/layer_1100/dead_codes"] == 1100
    assert not {"iteration", "timestamp_ms"} & set(run.data.metrics)
    artifacts = runs_dir / "mlartifacts" / run_id / "artifacts"
    assert (artifacts / "config" / "run_config.yaml").read_text() == "a: 1\n"
    assert len(notices) == 2, notices
    assert all(
        part in text for part, text in zip(("model.long cut", "long cut"), notices, strict=True)
    )


def test_resume_sends_what_is_missing_and_repeats_neither_steps_nor_params(runs_dir, store):
    run_dir = runs_dir / "resumed"
    tracker = open_tracker(run_dir)
    run_id = tracker.run_id
    tracker.log_params({"train.seed": 1, "train.train_iters": 100})
    log_losses(tracker, [(10, 10.0), (20, 20.0), (30, 30.0)])
    tracker.finish("requeue")
    assert store.get_run(run_id).info.status == "KILLED"
    with MetricsLog(run_dir) as log:  # what a killed process logged and did not send
        log.append({"iteration": 40, "loss": 40.0, "val/loss": 4.0})

    tracker = open_tracker(run_dir, start_iteration=20)  # the id is in mlflow.json
    assert tracker.run_id == run_id
    assert store.get_run(run_id).info.status == "RUNNING"
    tracker.log_params({"train.seed": 1, "train.train_iters": 200, "new": 3})
    with MetricsLog(run_dir) as log:
        log.truncate_after(20)
        for step in (30, 40, 50):
            log.append({"iteration": step, "loss": step + 0.5})
    tracker.finish("completed")

    losses = history(store, run_id, "loss")
    assert losses[:3] == [(10, 10.0), (20, 20.0), (30, 30.0)]  # the first value of 30 stays
    assert [step for step, _ in losses] == [10, 20, 30, 40, 50]
    run = store.get_run(run_id)
    assert run.data.params == {"train.seed": "1", "train.train_iters": "100", "new": "3"}
    assert run.data.tags["resume/train.train_iters"] == "200"
    repeats = [text for key, text in run.data.tags.items() if key.endswith("/repeats")]
    assert len(repeats) == 1 and repeats[0].startswith("iterations 21 to 30 are trained again")
    assert run.info.status == "FINISHED"


def test_who_holds_the_lock_is_told_once_and_training_goes_on(runs_dir, store, monkeypatch):
    monkeypatch.setattr(mlflow_tracker, "LOCK_WAIT", LockWait(0.3, tell_nobody))
    notices = []
    with (runs_dir / "mlflow.db.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        tracker = open_tracker(runs_dir / "held", report=notices.append)
        assert tracker.run_id is None and len(notices) == 1
        assert f"mlflow.db.lock has been held by process {os.getpid()} on" in notices[0]
        assert log_losses(tracker, [(1, 1.0)]) < SLOWEST_CALL_S
    deadline = time.monotonic() + 60
    while tracker.run_id is None and time.monotonic() < deadline:
        time.sleep(0.05)
    tracker.finish("completed")
    assert history(store, tracker.run_id, "loss") == [(1, 1.0)]
    assert len(notices) == 2 and notices[1].endswith("answers again")


def test_steps_discarded_by_a_rollback_are_followed_by_their_new_values(runs_dir, store):
    tracker = open_tracker(runs_dir / "rolled_back")
    log_losses(tracker, [(1, 1.0), (2, 2.0)])
    deadline = time.monotonic() + 30
    while len(history(store, tracker.run_id, "loss")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    with MetricsLog(tracker.run_dir) as log:
        log.truncate_after(1)
        tracker.rolled_back(1)
        log.append({"iteration": 2, "loss": 2.5})
    tracker.finish("completed")
    assert sorted(history(store, tracker.run_id, "loss")) == [(1, 1.0), (2, 2.0), (2, 2.5)]


def test_an_unknown_run_id_gives_a_new_run_tagged_with_it(runs_dir, store):
    unknown, notices = "0" * 32, []
    tracker = open_tracker(runs_dir / "unknown", resume_run_id=unknown, report=notices.append)
    log_losses(tracker, [(1, 1.0)])
    tracker.finish("failed")
    run = store.get_run(tracker.run_id)
    assert run.info.run_id != unknown and run.info.status == "FAILED"
    assert run.data.tags["resumed_from_unknown_run"] == unknown
    assert unknown in notices[0]

    store.delete_run(tracker.run_id)
    again = open_tracker(runs_dir / "unknown", report=notices.append)
    again.finish("completed")
    assert again.run_id != tracker.run_id
    assert history(store, again.run_id, "loss") == [(1, 1.0)]  # the whole log, not only what is new


def test_a_run_whose_id_was_not_noted_is_found_by_its_key(runs_dir, store):
    run_dir = runs_dir / "not_noted"
    first = open_tracker(run_dir)
    first.finish("requeue")
    record_file = run_dir / "mlflow.json"
    content = json.loads(record_file.read_text())
    assert content["runs"] == {f"sqlite:///{runs_dir}/mlflow.db": first.run_id}
    record_file.write_text(json.dumps(content | {"runs": {}}))  # killed before it was noted
    second = open_tracker(run_dir)
    second.finish("completed")
    assert second.run_id == first.run_id


# Imports once and forks, because eight imports of MLflow take longer than the whole test.
EIGHT_AT_ONCE = """
import os, sys
import mlflow
from vqmoe_megatron.track.metrics_log import MetricsLog
from vqmoe_megatron.track.mlflow.record import open_record
from vqmoe_megatron.track.mlflow.tracker import MlflowTracker

def task(run_dir):
    tracker = MlflowTracker(None, "exp", None, run_dir, open_record(run_dir, print))
    with MetricsLog(run_dir) as log:
        for step in range(20):
            log.append({"iteration": step, "loss": 1.0, "val/loss": 2.0})
            tracker.metrics_logged({})
    tracker.finish("completed", deadline_s=100)
    print(run_dir, tracker.run_id, flush=True)

wait_for, start = os.pipe()
children = []
for number in range(8):
    children.append(os.fork())
    if children[-1] == 0:
        os.close(start)
        os.read(wait_for, 1)  # returns in all of them when the parent closes its end
        task(f"{sys.argv[1]}/run{number}")
        os._exit(0)
os.close(start)
codes = [os.waitpid(child, 0)[1] for child in children]
print("codes", *codes)
"""


@pytest.mark.full
def test_eight_processes_create_one_fresh_database(tmp_path):
    command = [sys.executable, "-c", EIGHT_AT_ONCE, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    lines = ended.stdout.splitlines()
    assert lines[-1] == "codes 0 0 0 0 0 0 0 0", ended.stdout + ended.stderr
    run_ids = dict(line.split() for line in lines if line.startswith(str(tmp_path)))
    assert len(run_ids) == 8, lines
    # A locked database is waited for; nothing is refused or given up.
    assert not any("not tried" in line or "ends here" in line for line in lines), lines
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for run_id in run_ids.values():
        assert client.get_run(run_id).info.status == "FINISHED"
        for name in ("loss", "val/loss"):
            assert sorted(step for step, _ in history(client, run_id, name)) == list(range(20))


def test_a_refused_store_costs_nothing_but_notices(tmp_path):
    notices = []
    tracker = open_tracker(tmp_path, f"file:{tmp_path}/mlruns", report=notices.append)
    assert tracker.run_id is None
    assert log_losses(tracker, [(step, 1.0) for step in range(20)]) < SLOWEST_CALL_S
    start = time.perf_counter()
    tracker.finish("completed", deadline_s=20)
    assert time.perf_counter() - start < 5
    assert "cannot open a run" in notices[0]
    assert "logged iterations not sent: 20" in notices[-1]
    assert f"vqmoe mlflow-sync {tmp_path}" in notices[-1]


def test_a_server_that_never_answers_blocks_neither_start_nor_step_nor_end(tmp_path):
    notices = []
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        start = time.perf_counter()
        tracker = open_tracker(
            tmp_path,
            f"http://127.0.0.1:{silent.getsockname()[1]}",
            start_deadline_s=0.5,
            max_pending=5,
            report=notices.append,
        )
        assert time.perf_counter() - start < 2
        assert tracker.run_id is None
        assert log_losses(tracker, [(step, 1.0) for step in range(8)]) < SLOWEST_CALL_S
        for number in range(7):
            tracker.set_tags({"checkpoint": number})
        start = time.perf_counter()
        tracker.finish("completed", deadline_s=0.5)
        assert time.perf_counter() - start < 2
    assert "training goes on" in notices[0]
    assert "queue full: 2" in notices[-1] and "files not sent: 5" in notices[-1]
    assert "logged iterations not sent: 8" in notices[-1]
    assert open_record(tmp_path, print).tags == {"checkpoint": "6"}  # for the sync


def test_a_missing_file_does_not_hold_up_what_follows(runs_dir, store):
    notices = []
    tracker = open_tracker(runs_dir / "file", report=notices.append)
    tracker.log_artifact(runs_dir / "no_such_file.txt")
    log_losses(tracker, [(2, 2.0)])
    tracker.finish("completed")
    assert history(store, tracker.run_id, "loss") == [(2, 2.0)]
    assert "no_such_file.txt" in notices[0] and "not tried again" in notices[0]
    assert "artifact refused: 1" in notices[1] and len(notices) == 2
    tracker.finish("failed")  # a second finish changes nothing
    assert store.get_run(tracker.run_id).info.status == "FINISHED"


def test_what_an_attempt_goes_on_from_decides_on_its_run(runs_dir, store):
    run_dir, said = runs_dir / "attempts", []
    run_dir.mkdir()

    def attempt(state, is_resumed, is_same, mlflow_run_id):
        where = (run_dir, RunConfig(), 2, 5)
        run = TrackedRun(*where, is_resumed, is_same, mlflow_run_id, said.append)
        tracker = MlflowTracker.open(run)
        tracker.checkpoint_saved(run_dir / "iter_0000006", 6)
        tracker.finish(state)
        return tracker.run_id

    first = attempt("requeue", False, False, None)
    assert said[-1] == f"mlflow: sqlite:///{runs_dir}/mlflow.db run {first}"
    assert attempt("completed", False, True, None) == first  # killed before its first save
    assert attempt("completed", True, True, first) == first  # of a completed run: a longer one
    tags = store.get_run(first).data.tags
    assert tags["attempt"] == "3" and tags["attempt/02/from_iteration"] == "5"
    assert tags["checkpoint"] == str(run_dir / "iter_0000006") and tags["iteration"] == "6"
    second = attempt("completed", False, True, None)  # it had reached its end
    third = attempt("requeue", False, False, first)  # starts from the first one's checkpoint
    assert len({first, second, third}) == 3
    assert store.get_run(third).data.tags["started_from_run"] == first
    assert "started_from_run" not in tags and store.get_run(third).info.status == "KILLED"
    (run_dir / "mlflow.json").unlink()
    assert attempt("requeue", True, True, third) == third  # the checkpoint knew it


def test_every_final_state_has_an_mlflow_status():
    assert set(OUTCOME_OF_STATE) == set(STATES) - {"running"}
