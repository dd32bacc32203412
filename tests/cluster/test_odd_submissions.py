"""Jobs submitted otherwise than we would: from a path with a space, without an environment."""

from __future__ import annotations

import subprocess

from slurm_job import ROOT, SMALL_EP4, Job


def test_pretrain_job_without_environment_from_a_path_with_a_space(job_folder, job_corpus) -> None:
    """``sbatch --export=NONE`` would keep the meeting place from the ranks, and ``Command=`` of
    ``scontrol`` is not quoted. Only sbatch is called, so nobody sets VQMOE_ROOT or PYTHON."""
    repository = job_folder / "my own repo"
    repository.symlink_to(ROOT)
    (job_folder / "logs" / "slurm").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [
            "sbatch",
            "--parsable",
            "--export=NONE",
            "-N2",
            str(repository / "slurm" / "pretrain.sbatch"),
            str(repository / "recipes" / "parity.yaml"),
            f"data.path={job_corpus}",
            "train.output_dir=odd",
            *SMALL_EP4,
            "parallel.expert_model_parallel_size=2",
            "train.train_iters=8",
        ],
        cwd=job_folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    job = Job(job_folder, done.stdout.strip())
    job.run_dir = job_folder / "odd"
    assert job.wait_end() == "COMPLETED", job.log[-3000:]
    assert job.status()["state"] == "completed"
    assert "2 ranks by srun meet at" in job.log
