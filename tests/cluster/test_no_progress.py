"""A job that gets nowhere ends by itself, says why, and fails."""

from __future__ import annotations

from slurm_job import slurm, submit_pretraining


def test_attempts_that_begin_at_the_same_iteration_are_bounded(job_folder, job_corpus) -> None:
    """Queued again from outside before every first checkpoint, as by a failing node."""
    job = submit_pretraining(
        job_folder,
        "idle",
        job_corpus,
        "tracking.mlflow=false",
        VQMOE_PREFLIGHT="0",
        VQMOE_MAX_IDLE_ATTEMPTS="2",
    )
    for attempt in range(2):
        job.wait_until(lambda: job.log.count("training in") > attempt, "training")  # noqa: B023
        slurm("scontrol", "requeue", job.number)
    assert job.wait_end() == "FAILED"
    assert job.restarts == 2
    assert "giving up: 2 attempts of job" in job.log and "began at iteration 0" in job.log
    assert job.metrics() == []


def test_attempts_that_are_told_to_stop_before_the_first_step_are_bounded(
    job_folder, job_corpus
) -> None:
    job = submit_pretraining(
        job_folder,
        "stopped_early",
        job_corpus,
        "tracking.mlflow=false",
        VQMOE_PREFLIGHT="0",
        VQMOE_MAX_IDLE_ATTEMPTS="1",
    )
    job.wait_until(lambda: "training in" in job.log, "training")
    slurm("scancel", "--batch", "--signal=USR1", job.number)
    assert job.wait_end() == "FAILED"
    assert job.restarts == 1
    assert "decision: requeue iteration 0 -> 0" in job.log
    assert "giving up: 1 attempts of job" in job.log and "began at iteration 0" in job.log


def test_a_cancelled_job_stays_cancelled(job_folder, job_corpus) -> None:
    """Its ranks save and ask for a requeue, which the user does not want."""
    job = submit_pretraining(
        job_folder, "cancelled", job_corpus, "tracking.mlflow=false", VQMOE_PREFLIGHT="0"
    )
    job.wait_iteration(1)
    slurm("scancel", job.number)
    assert job.wait_end() == "CANCELLED"
    assert job.restarts == 0
