"""A job of a repository in an odd path, which is given nothing of the user's environment."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_job import ROOT, SMALL_EP4, Job, slurm

PARTS = ("launchers", "recipes", "slurm", "vqmoe_megatron")


@pytest.fixture
def odd_repository(tmp_path) -> Path:
    """A copy of the repository below a folder called slurm, with this interpreter as its .venv."""
    root = tmp_path / "slurm" / 'my "re\'po" ü'
    for name in PARTS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    (root / ".venv").symlink_to(sys.prefix)
    return root


def test_pretrain_job_from_a_path_with_a_space_without_the_user_s_variables(
    odd_repository, job_corpus, tmp_path
) -> None:
    """--export=NONE reaches srun by SLURM_EXPORT_ENV, --gpus by the job: steps need neither."""
    gpus = ["--gpus=4"] if "gpu:" in slurm("sinfo", "-h", "-o", "%G") else []
    folder = tmp_path / "jobs & runs"
    folder.mkdir()
    done = subprocess.run(
        [
            str(odd_repository / "slurm" / "submit.sh"),
            "--parsable",
            "-N2",
            "--ntasks-per-node=2",
            "--export=NONE",
            *gpus,
            str(odd_repository / "slurm" / "pretrain.sbatch"),
            str(odd_repository / "recipes" / "parity.yaml"),
            f"data.path={job_corpus}",
            "train.output_dir=a run",
            *SMALL_EP4,
            "train.train_iters=2",
            "optimizer.lr_warmup_iters=1",
            "tracking.mlflow=false",
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    job = Job(folder, done.stdout.strip())
    assert job.wait_end() == "COMPLETED", job.log + job.rank_log(0)
    assert "preflight of 4 ranks on 2 nodes" in job.log and "preflight: all good" in job.log
    job.run_dir = folder / "a run"
    assert job.status()["state"] == "completed"
