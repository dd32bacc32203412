"""``sbatch -N 4`` with DeepSpeed and experts over four nodes: stopped, queued again, and Megatron's
curve all the same."""

from __future__ import annotations

import signal

import pytest
from slurm_job import NUM_ITERS, Job, slurm, submit_pretraining

STOP_AT = 12  # iterations; after the first checkpoint, before the second


def test_a_deepspeed_job_goes_on_and_has_megatrons_curve(job_folder, job_corpus) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    quiet = {"VQMOE_PREFLIGHT": "0"}
    off = "tracking.mlflow=false"
    deepspeed = ("train.engine=deepspeed", "train.zero_stage=1")
    job = submit_pretraining(job_folder, "deepspeed", job_corpus, off, *deepspeed, **quiet)
    native = submit_pretraining(job_folder, "megatron", job_corpus, off, **quiet)
    job.wait_iteration(STOP_AT)
    rank = job.pause_first_rank()
    slurm("scancel", "--signal=USR1", job.number)
    rank.send_signal(signal.SIGCONT)
    assert job.wait_end() == "COMPLETED", job.log
    assert native.wait_end() == "COMPLETED", native.log
    assert job.restarts == 1, job.log
    assert losses(job) == pytest.approx(losses(native), rel=1e-5)


def losses(job: Job) -> list[float]:
    rows = job.metrics()
    assert [row["iteration"] for row in rows] == list(range(1, NUM_ITERS + 1))
    return [row["loss"] for row in rows]
