"""MLflow tracking against real stores: SQLite files, a real server, and servers that misbehave."""

import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient

from vqmoe_megatron.tracking.mlflow_tracker import OUTCOME_OF_STATE, MlflowTracker, NoTracker
from vqmoe_megatron.tracking.run_status import STATES

SLOWEST_CALL_S = 0.05
SERVER_START_S = 60


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """One folder of run directories, so that the module creates its database once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def store(runs_dir):
    return MlflowClient(f"sqlite:///{runs_dir}/mlflow.db")


def history(client, run_id, name):
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def timed_log(tracker, steps):
    """Log one loss per step; return the slowest call in seconds."""
    slowest = 0.0
    for step in steps:
        start = time.perf_counter()
        tracker.log_metrics({"loss": 1.0 / (step + 1)}, step)
        slowest = max(slowest, time.perf_counter() - start)
    return slowest


def test_a_run_arrives_whole_in_the_default_store(runs_dir, store):
    run_dir, notices = runs_dir / "whole", []
    run_dir.mkdir()
    (run_dir / "run_config.yaml").write_text("a: 1\n")
    tracker = MlflowTracker(None, "exp", None, run_dir, report=notices.append)
    run_id = tracker.run_id
    assert run_id is not None
    params = {f"model.p{i}": i for i in range(120)} | {"model.long": "x" * 6001}
    tracker.log_params(params)
    tracker.log_metrics({f"m{i}": i for i in range(1100)} | {"loss": 0.1 + 0.2}, 10)
    tracker.log_metrics({"loss": math.nan, "a@b": 1.0}, 20)
    tracker.log_artifact(run_dir / "run_config.yaml", "config")
    tracker.set_tags({"job": 7, "long": "y" * 8001})
    tracker.finish("FINISHED")

    run = store.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "whole"
    assert len(run.data.params) == 121 and run.data.params["model.p7"] == "7"
    assert len(run.data.params["model.long"]) == 6000 and len(run.data.tags["long"]) == 8000
    assert run.data.tags["job"] == "7" and run.data.tags["run_dir"] == str(run_dir)
    (_, first), (step, second) = history(store, run_id, "loss")
    assert first == 0.1 + 0.2 and step == 20 and math.isnan(second)
    assert run.data.metrics["m1099"] == 1099 and "a@b" not in run.data.metrics
    artifacts = runs_dir / "mlartifacts" / run_id / "artifacts"
    assert (artifacts / "config" / "run_config.yaml").read_text() == "a: 1\n"
    expected = ("model.long cut", "long cut", "'a@b'")
    assert len(notices) == 3, notices
    assert all(part in text for part, text in zip(expected, notices, strict=True))


def test_resume_repeats_neither_steps_nor_params(runs_dir, store):
    run_dir = runs_dir / "resumed"
    tracker = MlflowTracker(None, "exp", None, run_dir)
    run_id = tracker.run_id
    tracker.log_params({"train.seed": 1, "train.train_iters": 100})
    for step in (10, 20, 30):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_metrics({"val/loss": 20.0}, 20)
    tracker.finish("KILLED")
    assert store.get_run(run_id).info.status == "KILLED"

    tracker = MlflowTracker(None, "exp", None, run_dir, resume_run_id=run_id)
    assert tracker.run_id == run_id
    assert store.get_run(run_id).info.status == "RUNNING"
    tracker.log_params({"train.seed": 1, "train.train_iters": 200, "new": 3})
    for step in (20, 30, 40):  # resumed from the checkpoint of iteration 10
        tracker.log_metrics({"loss": float(step), "val/loss": float(step)}, step)
    tracker.finish("FINISHED")

    assert history(store, run_id, "loss") == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0)]
    assert history(store, run_id, "val/loss") == [(20, 20.0), (30, 30.0), (40, 40.0)]
    run = store.get_run(run_id)
    assert run.data.params == {"train.seed": "1", "train.train_iters": "100", "new": "3"}
    resumed_tags = {key: value for key, value in run.data.tags.items() if "resume/" in key}
    assert resumed_tags == {"resume/train.train_iters": "200"}
    assert run.info.status == "FINISHED"


def test_an_unknown_run_id_gives_a_new_run_tagged_with_it(runs_dir, store):
    unknown, notices = "0" * 32, []
    tracker = MlflowTracker(
        None, "exp", "name", runs_dir / "unknown", resume_run_id=unknown, report=notices.append
    )
    tracker.finish("FAILED")
    run = store.get_run(tracker.run_id)
    assert run.info.run_id != unknown and run.info.status == "FAILED"
    assert run.data.tags["resumed_from_unknown_run"] == unknown
    assert unknown in notices[0]


def test_two_processes_create_one_fresh_database(tmp_path):
    program = (
        "import sys\n"
        "from mlflow import MlflowClient\n"
        "from vqmoe_megatron.tracking.mlflow_tracker import MlflowTracker\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "tracker = MlflowTracker(None, 'exp', None, sys.argv[1])\n"
        "tracker.log_metrics({'loss': 1.0}, 1)\n"
        "tracker.finish('FINISHED')\n"
        "print(tracker.run_id)\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / f"run{i}")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(len(output) == 1 for output in outputs), outputs  # the id, and no complaint
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for (run_id,) in outputs:
        assert client.get_run(run_id).info.status == "FINISHED"
        assert history(client, run_id, "loss") == [(1, 1.0)]


def test_a_refused_store_costs_nothing_but_notices(tmp_path):
    notices = []
    tracker = MlflowTracker(f"file:{tmp_path}/mlruns", "exp", None, tmp_path, report=notices.append)
    assert tracker.run_id is None
    assert timed_log(tracker, range(20)) < SLOWEST_CALL_S
    start = time.perf_counter()
    tracker.finish("FINISHED", deadline_s=20)
    assert time.perf_counter() - start < 5
    assert "cannot open a run" in notices[0]
    assert "20 of 20 items did not reach" in notices[-1] and "metrics.jsonl" in notices[-1]


def test_a_server_that_never_answers_blocks_neither_start_nor_step_nor_end(tmp_path):
    notices = []
    with socket.create_server(("127.0.0.1", 0), backlog=50) as silent:
        start = time.perf_counter()
        tracker = MlflowTracker(
            f"http://127.0.0.1:{silent.getsockname()[1]}",
            "exp",
            None,
            tmp_path,
            start_deadline_s=0.5,
            max_pending=5,
            report=notices.append,
        )
        assert time.perf_counter() - start < 2
        assert tracker.run_id is None
        assert timed_log(tracker, range(8)) < SLOWEST_CALL_S
        start = time.perf_counter()
        tracker.finish("FINISHED", deadline_s=0.5)
        assert time.perf_counter() - start < 2
    assert "training goes on" in notices[0]
    assert "8 of 8 items" in notices[-1]
    assert "queue full: 3" in notices[-1] and "not sent: 5" in notices[-1]


def test_a_missing_file_does_not_hold_up_what_follows(runs_dir, store):
    notices = []
    tracker = MlflowTracker(None, "exp", None, runs_dir / "file", report=notices.append)
    tracker.log_artifact(runs_dir / "no_such_file.txt")
    tracker.log_metrics({"loss": "not a number"}, 1)
    tracker.log_metrics({"loss": 2.0}, 2)
    tracker.finish("FINISHED")
    assert history(store, tracker.run_id, "loss") == [(2, 2.0)]
    assert "no_such_file.txt" in notices[0] and "not a number" in notices[1]
    assert "2 of 3 items" in notices[2]
    tracker.finish("FAILED")  # a second finish changes nothing
    tracker.log_metrics({"loss": 3.0}, 3)
    assert store.get_run(tracker.run_id).info.status == "FINISHED"


def test_no_tracker_takes_every_call_of_the_real_one():
    real = {name for name in vars(MlflowTracker) if not name.startswith("_")}
    assert real == {name for name in vars(NoTracker) if not name.startswith("_")}
    tracker = NoTracker()
    tracker.log_params({"a": 1})
    tracker.log_metrics({"loss": 1.0}, 1)
    tracker.log_artifact("x", "y")
    tracker.set_tags({"a": 1})
    tracker.finish("FINISHED", deadline_s=1)
    assert tracker.run_id is None


def test_every_final_state_has_an_mlflow_status():
    assert set(OUTCOME_OF_STATE) == set(STATES) - {"running"}


class Server:
    """A real ``mlflow server`` on loopback, in its own process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--allowed-hosts", "127.0.0.1,127.0.0.1:*"),
            *("--backend-store-uri", f"sqlite:///{self.folder}/server.db"),
            *("--artifacts-destination", str(self.folder / "served")),
        ]
        environment = os.environ | {
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # starts in half the time
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + SERVER_START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        self.kill()
        log_tail = (self.folder / "server.log").read_text(errors="replace")[-500:]
        pytest.skip(f"no mlflow server on {self.uri} within {SERVER_START_S} s: {log_tail}")

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait_for_steps(client, run_id, num_steps):
    deadline = time.monotonic() + 30
    while len(history(client, run_id, "loss")) < num_steps and time.monotonic() < deadline:
        time.sleep(0.1)
    return [step for step, _ in history(client, run_id, "loss")]


def test_a_server_killed_midway_costs_no_step_and_leaves_no_hole(runs_dir, tmp_path):
    notices, server = [], Server(tmp_path)
    server.start()
    try:
        (tmp_path / "note.txt").write_text("hello")
        tracker = MlflowTracker(server.uri, "exp", None, tmp_path, report=notices.append)
        assert tracker.run_id is not None, notices
        tracker.log_artifact(tmp_path / "note.txt", "notes")
        slowest_up = timed_log(tracker, range(10))
        assert wait_for_steps(MlflowClient(server.uri), tracker.run_id, 10) == list(range(10))

        server.kill()
        slowest_down = 0.0
        for step in range(10, 30):  # a training loop that goes on while nobody listens
            slowest_down = max(slowest_down, timed_log(tracker, [step]))
            time.sleep(0.05)
        assert max(slowest_up, slowest_down) < SLOWEST_CALL_S

        server.start()
        start = time.perf_counter()
        tracker.finish("FINISHED", deadline_s=30)
        assert time.perf_counter() - start < 30
        client = MlflowClient(server.uri)
        assert [step for step, _ in history(client, tracker.run_id, "loss")] == list(range(30))
        assert client.get_run(tracker.run_id).info.status == "FINISHED"
        assert list((tmp_path / "served").rglob("note.txt"))
        assert "trying again" in notices[0] and "answers again" in notices[1], notices
        assert len(notices) == 2, notices
    finally:
        server.kill()
    print(f"slowest log_metrics: {slowest_up * 1e3:.2f} ms up, {slowest_down * 1e3:.2f} ms down")
