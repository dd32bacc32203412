"""A stop request that Slurm sends to the steps alone, while the nodes are still being checked."""

from __future__ import annotations

from slurm_job import slurm, submit_pretraining


def test_a_job_that_is_signalled_in_its_preflight_is_queued_again(job_folder, job_corpus) -> None:
    job = submit_pretraining(job_folder, "early", job_corpus, "tracking.mlflow=false")
    preflight = f"{job.number}.1"  # step 0 checks the recipe
    job.wait_until(
        lambda: preflight in slurm("squeue", "--steps", "--noheader", "--format=%i"),
        "in its preflight",
    )
    slurm("scancel", "--signal=USR1", job.number)
    assert job.wait_end() == "COMPLETED", job.log
    assert job.restarts == 1 and job.status()["state"] == "completed"
    assert "queued again: told to stop before training" in job.log
    assert len((job.run_dir / "slurm_attempts.tsv").read_text().splitlines()) == 2
