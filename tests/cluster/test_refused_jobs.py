"""What cannot run says so in one message, in the job's first seconds or before it is submitted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_job import ROOT, slurm, submit, submit_pretraining


def test_tasks_per_node_that_are_not_the_gpus(job_folder, job_corpus) -> None:
    if "gpu:" not in slurm("sinfo", "-h", "-o", "%G"):
        pytest.skip("the cluster's nodes claim no GPUs: VQMOE_NODE_GPUS=2 slurm/cluster/up.sh")
    job = submit(  # --gpus: submit.sh cannot know how many that is per node
        job_folder,
        "-N2",
        "--gpus=4",
        str(ROOT / "slurm" / "pretrain.sbatch"),
        str(ROOT / "recipes" / "parity.yaml"),
        f"data.path={job_corpus}",
    )
    assert job.wait_end() == "FAILED"
    errors = [line for line in job.log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: tasks per node = GPUs per node fails: 1 != 2;")


def test_recipe_that_does_not_divide(job_folder, job_corpus) -> None:
    job = submit_pretraining(
        job_folder, "uneven", job_corpus, "parallel.expert_model_parallel_size=3"
    )
    assert job.wait_end() == "FAILED"
    assert "3" in job.log and "error: the recipe cannot run on 4 ranks" in job.log
    assert "training in" not in job.log


def test_nothing_is_submitted_when_it_must_fail(job_folder) -> None:
    number_before = slurm("squeue", "-h", "-t", "all", "-o", "%A")
    refused = subprocess.run(
        [
            str(ROOT / "slurm" / "submit.sh"),
            "-N2",
            "--gpus-per-node=2",
            str(ROOT / "slurm" / "pretrain.sbatch"),
            str(ROOT / "recipes" / "parity.yaml"),
        ],
        cwd=job_folder,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert refused.returncode == 2
    assert "tasks per node = GPUs per node fails: 1 != 2" in refused.stderr
    assert slurm("squeue", "-h", "-t", "all", "-o", "%A") == number_before


def test_preflight_names_the_node_that_sees_another_folder(job_folder, tmp_path) -> None:
    """Node n3 is given a run directory of its own, as where a file system is not mounted."""
    script = tmp_path / "other_folder.sh"
    script.write_text(
        "#!/bin/bash\n"
        f'folder={tmp_path}/shared; [ "$SLURMD_NODENAME" = n3 ] && folder={tmp_path}/local\n'
        f'mkdir -p "$folder"; exec {sys.executable} -m vqmoe_megatron.cli preflight '
        '--run-dir "$folder"\n'
    )
    script.chmod(0o755)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "19871",
    }
    done = subprocess.run(
        ["srun", "-N4", "--ntasks-per-node=1", str(script)],
        cwd=job_folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bad nodes: --exclude=n3" in done.stdout
    assert Path(tmp_path / "shared").is_dir()
