"""``sbatch -N 4`` with experts across four nodes: disturbed in every way, it ends as if it was not.

The jobs run at the same time; each test waits for its own.
"""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from curves import assert_one_whole_mlflow_run, assert_same_curve
from slurm_job import Job, slurm, submit_pretraining

DISTURB_AT = 12  # iterations; after the first checkpoint, before the second


def undisturbed(job: Job) -> None:
    """Nothing happens to it."""


def requeued(job: Job) -> None:
    job.wait_iteration(DISTURB_AT)
    job.pause_first_rank()  # Slurm's own SIGCONT wakes it
    slurm("scontrol", "requeue", job.number)


def signalled(job: Job) -> None:
    job.wait_iteration(DISTURB_AT)
    rank = job.pause_first_rank()
    slurm("scancel", "--signal=USR1", job.number)
    rank.send_signal(signal.SIGCONT)


def out_of_time(job: Job) -> None:
    """The time limit comes near enough for the signal of #SBATCH --signal=B:USR1@300."""
    job.wait_iteration(DISTURB_AT)
    rank = job.pause_first_rank()
    slurm("scontrol", "update", f"JobId={job.number}", f"TimeLimit={job.minutes_run + 4}")
    job.wait_until(lambda: "sent USR1 to step" in job.log, "told that its time is nearly over")
    rank.send_signal(signal.SIGCONT)
    job.wait_until(lambda: job.restarts == 1, "queued again")
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")


def by_torchrun(job: Job) -> None:
    job.wait_iteration(DISTURB_AT)
    rank = job.pause_first_rank()
    slurm("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until(lambda: "sent USR1 to step" in job.log, "told to stop")
    rank.send_signal(signal.SIGCONT)


DISTURBANCES = {
    "undisturbed": (undisturbed, 0, {"VQMOE_PREFLIGHT": "1"}),
    "requeued": (requeued, 1, {}),
    "signalled": (signalled, 1, {}),
    "out_of_time": (out_of_time, 1, {}),
    "by_torchrun": (by_torchrun, 1, {"VQMOE_LAUNCHER": "torchrun", "VQMOE_RANKS_PER_NODE": "2"}),
}


@pytest.fixture(scope="module")
def jobs(job_folder, job_corpus, empty_store):
    """Name -> (job, a future that is done when the job has ended)."""

    def store(name: str):
        return job_folder / f"{name}.db"

    def disturb(name: str, job: Job) -> str:
        DISTURBANCES[name][0](job)
        return job.wait_end()

    started: dict[str, tuple[Job, Future]] = {}
    with ThreadPoolExecutor(len(DISTURBANCES)) as threads:
        for name, (_, _, environment) in DISTURBANCES.items():
            shutil.copy(empty_store, store(name))
            job = submit_pretraining(
                job_folder,
                name,
                job_corpus,
                "tracking.mlflow=true",
                f"tracking.mlflow_uri=sqlite:///{store(name)}",
                nodes="-N2" if name == "by_torchrun" else "-N4",
                **{"VQMOE_PREFLIGHT": "0", **environment},
            )
            started[name] = (job, threads.submit(disturb, name, job))
        yield started


@pytest.mark.parametrize("name", DISTURBANCES)
def test_job_ends_with_the_undisturbed_curve(jobs, name, job_folder) -> None:
    reference, reference_end = jobs["undisturbed"]
    job, end = jobs[name]
    assert end.result() == "COMPLETED", job.log
    assert reference_end.result() == "COMPLETED", reference.log
    assert job.restarts == DISTURBANCES[name][1], job.log
    assert job.status()["state"] == "completed"
    assert_same_curve(job, reference)
    assert_one_whole_mlflow_run(job, job_folder / f"{name}.db")


def test_experts_were_spread_over_four_nodes(jobs) -> None:
    job, end = jobs["undisturbed"]
    end.result()
    assert "NumNodes=4 " in job.record
    assert "preflight of 4 ranks on 4 nodes" in job.log and "preflight: all good" in job.log


def test_disturbed_attempts_went_on_where_they_stopped(jobs) -> None:
    for name in ("signalled", "out_of_time", "by_torchrun"):
        job, end = jobs[name]
        end.result()
        attempts = (job.run_dir / "slurm_attempts.tsv").read_text().splitlines()
        assert [line.split("\t")[:2] for line in attempts] == [[job.number, "0"], [job.number, "1"]]
        resumed_at = int(attempts[1].split("\t")[2])
        assert resumed_at >= DISTURB_AT, f"{name}: saved at {resumed_at}\n{job.log}"
        assert f"decision: requeue iteration 0 -> {resumed_at}" in job.log
