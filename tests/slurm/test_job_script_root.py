"""A job script finds its repository from what ``scontrol show job`` prints, whatever its path.

Slurm runs a copy of the script, so its own place says nothing; ``Command=`` is not quoted.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from shell_run import ROOT, fake_command

PLACES = [
    "plain",
    "my repo",
    "two  spaces and 'quotes'",
    "with/slurm/in it",
    "日本 語",
    "a=b Command=c",
]
SCRIPTS = ["pretrain", "study", "mlflow"]


@pytest.fixture
def job(tmp_path: Path):
    """Run a copy of a job script whose repository has launchers that only say where they are."""

    def run(script: str, place: str, *arguments: str, **environment: str):
        repository = tmp_path / place
        (repository / "launchers").mkdir(parents=True)
        (repository / "slurm").mkdir()
        for launcher in ("slurm", "slurm_world"):
            (repository / "launchers" / f"{launcher}.sh").write_text(
                'echo found; cd "$root" && pwd -P; exit 0\n'
            )
        command = f"{repository}/slurm/{script}.sbatch {' '.join(arguments)}"
        (tmp_path / "job.txt").write_text(
            f"JobId=7 JobName=x\n   Command={command}\n   WorkDir=/\n"
        )
        fake_command(tmp_path, "scontrol", f"cat {tmp_path}/job.txt")
        fake_command(tmp_path, "sleep", "exit 0")
        done = subprocess.run(
            ["bash", str(ROOT / "slurm" / f"{script}.sbatch"), *arguments],
            cwd=tmp_path,
            env={
                "PATH": f"{tmp_path}:/usr/bin:/bin",
                "SLURM_JOB_ID": "7",
                "SLURM_ARRAY_JOB_ID": "7",
                "SLURM_ARRAY_TASK_ID": "0",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, repository

    return run


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_repository_is_found(job, script: str, place: str) -> None:
    done, repository = job(script, place, "r.yaml")
    assert done.stdout.splitlines() == ["found", str(repository.resolve())], done.stderr


def test_arguments_that_look_like_the_script_are_none(job) -> None:
    done, repository = job("pretrain", "my repo", "r.yaml", "data.path=/x/slurm/pretrain.sbatch")
    assert done.stdout.splitlines() == ["found", str(repository.resolve())], done.stderr


def test_a_wrong_place_is_named(job, tmp_path: Path) -> None:
    done, _ = job("pretrain", "plain", "r.yaml", VQMOE_ROOT=str(tmp_path / "elsewhere"))
    assert done.returncode == 2
    assert f"no launchers/slurm.sh in '{tmp_path}/elsewhere'; set VQMOE_ROOT" in done.stderr


def test_submit_tells_the_job(tmp_path: Path) -> None:
    """sbatch gets VQMOE_ROOT in its environment; what the user has set stays."""
    fake_command(tmp_path, "sbatch", 'echo "$VQMOE_ROOT"')
    (tmp_path / "r.yaml").write_text("")
    for own, expected in ((None, str(ROOT)), ("/mine", "/mine")):
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        environment |= {} if own is None else {"VQMOE_ROOT": own}
        done = subprocess.run(
            [str(ROOT / "slurm/submit.sh"), str(ROOT / "slurm/pretrain.sbatch"), "r.yaml"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.strip() == expected, done.stderr
