"""The slurmd of one node dies in the middle; its rank does not, and must do no harm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from curves import assert_one_whole_mlflow_run, assert_same_curve
from slurm_job import Job, slurm, submit_pretraining

DISTURB_AT = 12


def kill_slurmd(node: str) -> None:
    pid_file = Path(os.environ["SLURM_CONF"]).parent / f"slurmd_{node}.pid"
    os.kill(int(pid_file.read_text()), signal.SIGKILL)


def start_slurmd(node: str) -> None:
    subprocess.run(["slurmd", "-N", node, "-f", os.environ["SLURM_CONF"]], check=True, timeout=60)


@pytest.fixture(scope="module")
def reference(job_folder, job_corpus) -> Job:
    job = submit_pretraining(
        job_folder, "reference", job_corpus, "tracking.mlflow=false", VQMOE_PREFLIGHT="0"
    )
    return job


@pytest.mark.parametrize("node", ["n3", "n1"])
def test_job_survives_the_death_of_a_slurmd(
    node, reference, job_folder, job_corpus, empty_store
) -> None:
    """n1 is also where the batch script and rank 0 are, which holds the run directory's lock."""
    assert reference.wait_end() == "COMPLETED"
    store = job_folder / f"without_{node}.db"
    shutil.copy(empty_store, store)
    job = submit_pretraining(
        job_folder,
        f"without_{node}",
        job_corpus,
        "tracking.mlflow=true",
        f"tracking.mlflow_uri=sqlite:///{store}",
    )
    job.wait_iteration(DISTURB_AT)
    orphan = job.rank_process(2 if node == "n3" else 0)
    job.pause_first_rank()  # or training might end before Slurm notices
    kill_slurmd(node)
    try:
        job.wait_until(lambda: job.restarts == 1, "queued again by Slurm", 180)
    finally:
        start_slurmd(node)
    assert job.wait_end() == "COMPLETED", job.log
    assert not orphan.is_running()
    assert job.restarts == 1
    assert_same_curve(job, reference)
    assert_one_whole_mlflow_run(job, store)
    assert slurm("sinfo", "-h", "-t", "down", "-o", "%N") == ""
