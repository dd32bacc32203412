"""What sbatch's options put into the environment does not change the steps of a job."""

from __future__ import annotations

import pytest
from shell_run import ROOT, bash, fake_command

# Set by sbatch for its options, or left over from where it was called; srun and ranks read them.
UNWANTED = {
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_GPUS": "16",
    "SLURM_NTASKS_PER_GPU": "1",
    "RANK": "3",
    "LOCAL_RANK": "3",
    "WORLD_SIZE": "8",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.mark.parametrize(
    ("name", "value"),
    [*UNWANTED.items(), ("SLURM_EXPORT_ENV", "ALL,A=b"), ("SLURM_EXPORT_ENV", "PYTHON")],
)
def test_a_job_takes_it_away(tmp_path, name, value) -> None:
    environment = {**UNWANTED, name: value}
    done = bash(f"load_site '{ROOT}'; env", "slurm_world", cwd=tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert name not in names and {"VQMOE_LAUNCHER", "OMP_NUM_THREADS"} <= names


def test_cpus_per_task_are_handed_on(tmp_path) -> None:
    done = bash(f"load_site '{ROOT}'; env", "slurm_world", cwd=tmp_path, SLURM_CPUS_PER_TASK="12")
    assert {"SRUN_CPUS_PER_TASK=12", "OMP_NUM_THREADS=12"} <= set(done.stdout.splitlines())


@pytest.mark.parametrize(("num_gpus", "options"), [(0, []), (8, ["--gpus-per-node=8"])])
def test_one_process_does_not_ask_for_the_gpus_of_all_nodes(tmp_path, num_gpus, options) -> None:
    """Without its own number a step of one node wants all that --gpus gave the job."""
    fake_command(tmp_path, "srun", f'printf "%s\\n" "$@" >\'{tmp_path}/srun\'; echo the answer')
    script = (
        "find_world; rank=(rank.sh) vqmoe=(vqmoe) num_steps=0\n"
        'ask_vqmoe preflight "a recipe"; echo "$answer"'
    )
    path = f"{tmp_path}:/usr/bin:/bin"
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": str(num_gpus)}
    if num_gpus:
        job["SLURM_NTASKS_PER_NODE"] = str(num_gpus)
    sourced = ("slurm_world", "slurm", "slurm_attempt")
    done = bash(script, *sourced, cwd=tmp_path, PATH=path, VQMOE_LAUNCHER="srun", **job)
    assert done.stdout == "the answer\n", done.stderr
    seen = (tmp_path / "srun").read_text().splitlines()
    one = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1"]
    assert seen == [*one, *options, "rank.sh", "vqmoe", "preflight", "a recipe"]
