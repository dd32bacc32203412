"""A study as a real array: two tasks killed on the way, submitted again, finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from slurm_job import END_SECONDS, ROOT, Job, slurm

NUM_ITERS = 1000
KILL_AT = 5  # iterations; far from the end, where the only unasked save is


@pytest.fixture(scope="module")
def study_file(job_folder, job_corpus) -> Path:
    """Four runs of one rank each: experts 4 and 8, without and with codes."""
    content = {
        "study": {
            "name": "array",
            "output_dir": "study",
            "recipe": str(ROOT / "recipes" / "parity.yaml"),
            "rule": "equal_tokens",
        },
        "set": [
            f"data.path={job_corpus}",
            "model.num_layers=2",
            "model.hidden_size=32",
            "model.num_attention_heads=4",
            "model.seq_length=16",
            "vq.num_codes=4 * experts",
            "train.global_batch_size=4",
            "train.eval_iters=0",
            f"train.train_iters={NUM_ITERS}",
            "train.log_interval=1",
            "tracking.mlflow=true",
        ],
        "grid": {
            "experts": [4, 8],
            "router": {"smoe": ["vq.path=continuous"], "vq": ["vq.path=dual"]},
        },
    }
    path = job_folder / "array.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def study(folder: Path, *arguments: str) -> str:
    """``vqmoe study ARGUMENTS`` in ``folder``; what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "vqmoe_megatron.cli", "study", *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "VQMOE_PREFLIGHT": "0",  # its own test is elsewhere
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def submitted_array(shown: str) -> tuple[str, str]:
    """Job id and --array of the one array that was submitted."""
    (command,) = [line for line in shown.splitlines() if line.startswith("sbatch ")]
    (job,) = [line.split()[2] for line in shown.splitlines() if line.startswith("submitted job")]
    array = command.partition("--array=")[2].split()[0]
    return job.rstrip(":"), array


def wait_for_end(job: str) -> None:
    """Wait until Slurm has no task of the array that waits, runs or ends."""
    deadline = time.monotonic() + END_SECONDS
    while left := slurm("squeue", "--array", "--noheader", f"--jobs={job}", "--format=%K %T"):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


def metrics(folder: Path, name: str) -> list[dict]:
    path = folder / "study" / "runs" / name / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def kill_rank(job: str, index: str) -> None:
    """SIGKILL to the training process of one array task."""
    for process in psutil.process_iter():
        try:
            is_training = process.cmdline()[1:4] == ["-m", "vqmoe_megatron.cli", "pretrain"]
            variables = process.environ() if is_training else {}
        except (psutil.Error, OSError):
            continue
        place = variables.get("SLURM_ARRAY_JOB_ID"), variables.get("SLURM_ARRAY_TASK_ID")
        if place == (job, index):
            process.kill()
            return
    raise AssertionError(f"no training process of task {job}_{index}")


def wait_iteration(folder: Path, name: str, task: Job) -> None:
    task.run_dir = folder / "study" / "runs" / name
    task.wait_iteration(KILL_AT)


def test_a_study_that_lost_tasks_finishes_when_submitted_again(study_file, job_folder) -> None:
    shown = study(job_folder, "submit", str(study_file), "--max-parallel", "2")
    assert "4 runs: 4 waiting" in shown and "parent run" in shown
    job, array = submitted_array(shown)
    assert array == "0-3%2"

    # While its tasks are in the queue, nothing is submitted twice.
    shown = study(job_folder, "submit", str(study_file))
    assert shown.splitlines()[-1] == "nothing to submit" and f"{job}_3" in shown

    # One task is cancelled, which lets it save; the training of another is killed hard.
    first, second = Job(job_folder, f"{job}_0"), Job(job_folder, f"{job}_1")
    wait_iteration(job_folder, "experts4-smoe", first)
    slurm("scancel", f"{job}_0")
    wait_iteration(job_folder, "experts4-vq", second)
    kill_rank(job, "1")
    wait_for_end(job)
    shown = study(job_folder, "status", str(study_file))
    assert "2 finished" in shown.splitlines()[-1] and " lost" in shown, shown
    for name in ("experts4-smoe", "experts4-vq"):
        assert metrics(job_folder, name)[-1]["iteration"] < NUM_ITERS

    again, array = submitted_array(study(job_folder, "submit", str(study_file)))
    assert array == "0-1%4" and again != job
    wait_for_end(again)
    shown = study(job_folder, "status", str(study_file))
    assert shown.splitlines()[-1] == "4 runs: 4 finished", shown
    for name in ("experts4-smoe", "experts4-vq", "experts8-smoe", "experts8-vq"):
        iterations = [row["iteration"] for row in metrics(job_folder, name)]
        assert iterations == list(range(1, NUM_ITERS + 1)), name
    assert study(job_folder, "submit", str(study_file)).endswith("nothing to submit\n")
    assert_children_of_one_parent(job_folder / "study")


def assert_children_of_one_parent(folder: Path) -> None:
    """One finished MLflow run per run of the study, each iteration once, all under the parent."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("vqmoe")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(json.loads((folder / "mlflow_parent.json").read_text())["run_id"])
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert sorted(run.info.run_name for run in runs.values()) == sorted(
        ["experts4-smoe", "experts4-vq", "experts8-smoe", "experts8-vq"]
    )
    for run in runs.values():
        assert run.info.status == "FINISHED"
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "loss")]
        assert sorted(steps) == list(range(1, NUM_ITERS + 1))


def test_an_index_past_the_study_ends_with_one_line(study_file, job_folder) -> None:
    """Submitted by hand: vqmoe study submit has no such index."""
    done = subprocess.run(
        [
            "sbatch",
            "--parsable",
            "--array=99",
            f"--output={job_folder}/past_%a.log",
            str(ROOT / "slurm" / "study.sbatch"),
            str(study_file),
        ],
        cwd=job_folder,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert Job(job_folder, f"{done.stdout.strip()}_99").wait_end() == "FAILED"
    log = (job_folder / "past_99.log").read_text()
    assert "error: --index 99 is not in study" in log and "Traceback" not in log
    assert "indices 0 to 3" in log
