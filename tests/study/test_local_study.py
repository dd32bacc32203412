"""Real runs of a study on this machine: a failure among them, a stop, and going on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqmoe_megatron.runtime.table_console import table_console
from vqmoe_megatron.study import local_study
from vqmoe_megatron.study.local_display import LocalDisplay
from vqmoe_megatron.study.local_study import EXIT_REQUEUE, LocalStudy, run_environment
from vqmoe_megatron.study.planned_run import PlannedRun
from vqmoe_megatron.study.run_state import RunState, run_state
from vqmoe_megatron.study.study import load_study
from vqmoe_megatron.study.study_task import STARTER_VARIABLE, launched_ranks

ROOT = Path(__file__).resolve().parents[2]
LONG_ITERS = 150
TIMEOUT_SECONDS = 600  # a quiet machine needs a twentieth of it


def start_study_run(study: Path, *options: str) -> subprocess.Popen:
    """``vqmoe study run`` in a process of its own, its output in a pipe."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        environment.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "vqmoe_megatron.cli", "study", "run", str(study), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and output; a process that takes too long is killed, and its runs with it."""
    try:
        shown, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
    return process.returncode, shown


def test_a_run_inherits_no_world(monkeypatch) -> None:
    world = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "SLURM_STEP_ID": "0"}
    place = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    kept = {"PATH": "/bin", "SLURM_JOB_ID": "7"}
    environment = run_environment({**world, **place, **kept}, 3)
    assert environment == {**kept, "OMP_NUM_THREADS": "3", STARTER_VARIABLE: str(os.getpid())}
    assert launched_ranks(environment) is None
    assert run_environment({"OMP_NUM_THREADS": "1"}, 3)["OMP_NUM_THREADS"] == "1"


def test_runs_elsewhere_are_looked_at_again_and_finished_ones_not_started(
    write_study, monkeypatch
) -> None:
    """Between the first look and a run's turn others have finished, taken or given up runs."""
    study = load_study(write_study(grid={"seed": [1, 2, 3]}))
    states = {
        "seed1": ["waiting", "finished"],  # another process did it meanwhile
        "seed2": ["running", "running", "stopped"],  # given up while we were at work
        "seed3": ["running", "running", "running"],
    }

    def next_state(run: PlannedRun) -> RunState:
        return RunState(states[run.name].pop(0), 0, 8, "", {})

    started, said = [], []
    monkeypatch.setattr(local_study, "run_state", next_state)
    display = LocalDisplay(table_console())
    monkeypatch.setattr(display, "say", said.append)
    local = LocalStudy(study, study.runs, 1, display)
    monkeypatch.setattr(local, "_start", started.append)
    assert local.run() == EXIT_REQUEUE  # seed3 is not finished
    assert started == [1]
    assert said[1:] == [
        "seed2 is running elsewhere: looked at again at the end",
        "seed3 is running elsewhere: looked at again at the end",
        "seed3 is still running elsewhere: left alone",
    ]


def test_the_cores_are_shared_among_the_ranks_of_all_runs_at_a_time(
    write_study, monkeypatch
) -> None:
    study = load_study(write_study(grid={"ranks": [1, 2, 4]}))
    display = LocalDisplay(table_console())

    def shares(num_cores: int, num_jobs: int) -> list[int]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(num_cores)))
        local = LocalStudy(study, study.runs, num_jobs, display)
        return [local._num_threads(num_ranks) for num_ranks in (1, 2, 4)]

    assert shares(2, 1) == [2, 1, 1]
    assert shares(2, 2) == [1, 1, 1]  # two runs on two cores do not fight
    assert shares(16, 2) == [8, 4, 2]
    assert shares(8, 4) == [2, 1, 1]  # four runs of one rank, four of two, two of four at a time

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    said: list[str] = []
    monkeypatch.setattr(display, "say", said.append)
    local = LocalStudy(study, study.runs, 2, display)
    assert local._threads_in_words() == "OMP_NUM_THREADS=1 to 4 per rank on 8 cores"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local._threads_in_words() == "OMP_NUM_THREADS=3 of the environment per rank"


@pytest.mark.parametrize(
    ("num_cores", "num_jobs", "most"),
    [
        (2, 3, [1, 1, 1, 2, 2]),  # runs of one rank start as asked, others fill what is left
        (4, 3, [1, 1, 1, 2, 2]),
        (1, 1, [1, 1, 1, 2, 2]),
    ],
)
def test_runs_of_several_ranks_wait_for_cores(
    write_study, monkeypatch, num_cores, num_jobs, most
) -> None:
    """Every step ends the oldest run; ``most`` is the ranks of each run, in the order of start."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(num_cores)))
    grid = {"ranks": [1, 2], "seed": [1, 2, 3]}
    study = load_study(write_study(grid=grid, exclude=[{"ranks": 2, "seed": 3}]))
    local = LocalStudy(study, study.runs, num_jobs, LocalDisplay(table_console()))
    waiting, started, at_once = list(study.runs), [], []
    while waiting or local._active:
        while waiting and local._has_room(waiting[0]):
            index = waiting.pop(0)
            run = study.runs[index]
            local._active[index] = local_study._Started(run, None, None, 0, 0.0)
            started.append(run.num_ranks)
        at_once.append([one.run.num_ranks for one in local._active.values()])
        del local._active[next(iter(local._active))]
    assert started == most
    for ranks in at_once:
        assert len(ranks) <= num_jobs
        assert len(ranks) == 1 or sum(ranks) <= max(num_cores, num_jobs)


@pytest.fixture
def eventful_study(write_study):
    """One run that is refused, one long enough to be stopped in, one after it."""
    variants = {
        "broken": ["checkpoint.load=not/there"],
        "long": [],
        "later": ["train.seed=5"],
    }
    path = write_study(
        grid={"run": variants},
        more=[f"train.train_iters={LONG_ITERS}", "train.log_interval=1"],
    )
    return load_study(path)


@pytest.mark.full
def test_a_study_survives_a_failure_and_a_stop_and_finishes_what_is_asked(eventful_study) -> None:
    study = eventful_study
    metrics = study.runs[1].run_dir / "metrics.jsonl"
    process = start_study_run(study.file.path)
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, shown = finish(process)

    # The refused run is told with its reason and does not stop the next; SIGTERM reaches the run
    # in work, which saves; nothing is started after it.
    assert code == 1, shown
    lines = shown.splitlines()
    assert lines[0].startswith("3 runs, 3 unfinished, 1 at a time")
    assert lines[2].startswith("failed broken (index 0)") and "not/there" in lines[2]
    assert "SIGTERM: 1 run to save and end" in shown
    assert "stopped long (index 1)" in shown and "later" not in shown
    assert lines[-1] == "3 runs: 1 stopped, 1 failed, 1 waiting"
    stopped = run_state(study.runs[1])
    assert stopped.state == "stopped" and 5 <= stopped.iteration < LONG_ITERS

    # Started again, it goes on where it was saved: every iteration is there once.
    code, shown = finish(start_study_run(study.file.path, "--only", "long"))
    assert code == 0 and "finished long (index 1)" in shown, shown
    assert run_state(study.runs[1]).is_finished
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == list(range(1, LONG_ITERS + 1))

    # Finished is skipped: no process writes to its log again.
    log = study.log_of[1].read_bytes()
    code, shown = finish(start_study_run(study.file.path, "--only", "1"))
    assert code == 0 and shown.startswith("1 run, 0 unfinished"), shown
    assert study.log_of[1].read_bytes() == log


def test_runs_stand_under_the_studys_mlflow_run(write_study) -> None:
    path = write_study(grid={"seed": [1]}, more=["tracking.mlflow=true"])
    study = load_study(path)
    code, shown = finish(start_study_run(path))
    assert code == 0, shown
    parent_id = json.loads(study.folder.mlflow_parent.read_text())["run_id"]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=study.runs[0].config.tracking.mlflow_uri)
    experiment = client.get_experiment_by_name("vqmoe")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(parent_id)
    assert parent.info.run_name == "tiny" and parent.info.status == "FINISHED"
    (child,) = runs.values()
    assert child.info.run_name == "seed1" and child.info.status == "FINISHED"
    assert child.data.tags["mlflow.parentRunId"] == parent_id
    assert child.data.tags["point/seed"] == "1"
    assert child.data.metrics["loss"] > 0
