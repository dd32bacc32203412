"""``slurm/submit.sh`` refuses before sbatch is called, and hands the rest over untouched."""

from __future__ import annotations

import subprocess

import pytest
from shell_run import ROOT, fake_command

SUBMIT = str(ROOT / "slurm" / "submit.sh")
PRETRAIN = str(ROOT / "slurm" / "pretrain.sbatch")
STUDY = str(ROOT / "slurm" / "study.sbatch")


@pytest.fixture
def submit(tmp_path):
    """Call it in a folder with a recipe; sbatch only writes down its arguments."""
    fake_command(tmp_path, "sbatch", f'printf "%s\\n" "$@" >{tmp_path}/submitted')
    (tmp_path / "r.yaml").write_text("")

    def run(*arguments: str, cwd=tmp_path, **environment: str):
        return subprocess.run(
            [SUBMIT, *arguments],
            cwd=cwd,
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["-N", "4", PRETRAIN, "r.yaml", "vq.num_codes=8"],
        ["--gpus-per-node=8", "--ntasks-per-node", "8", PRETRAIN, "r.yaml"],
        ["--gres=gpu:h100:8", "--ntasks-per-node=8", PRETRAIN, "r.yaml"],
        ["-N", "2", "-n", "16", "--gpus-per-node=8", PRETRAIN, "r.yaml"],
        ["--gres=tmpfs:100,gpu:h100:8(S:0-1)", "--ntasks-per-node=8", PRETRAIN, "r.yaml"],
        ["--gres", "gpu:8,tmpfs:100", "--ntasks-per-node=8", PRETRAIN, "r.yaml"],
        ["-J", "try.sbatch", "--output=x.sbatch", "--exclusive", PRETRAIN, "r.yaml"],
        ["--array=0-3%2", STUDY, "r.yaml"],
        [str(ROOT / "slurm" / "mlflow.sbatch"), "runs/mlflow"],
    ],
)
def test_arguments_reach_sbatch_and_the_log_folder_is_there(submit, tmp_path, arguments) -> None:
    done = submit(*arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "submitted").read_text().splitlines() == arguments
    assert (tmp_path / "logs" / "slurm").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-N4", PRETRAIN, "missing.yaml"], "no file 'missing.yaml'"),
        (["-N4", PRETRAIN], "pretrain.sbatch needs a YAML file"),
        (["-N4", "other.sbatch", "r.yaml"], "no job script at 'other.sbatch'"),
        (["--gpus-per-node=8", PRETRAIN, "r.yaml"], "tasks per node = GPUs per node fails: 1 != 8"),
        (
            ["--gpus-per-node", "h100:8", "--ntasks-per-node=4", PRETRAIN, "r.yaml"],
            "tasks per node = GPUs per node fails: 4 != 8",
        ),
        (["--gres=gpu:2", PRETRAIN, "r.yaml"], "tasks per node = GPUs per node fails: 1 != 2"),
        (
            ["--gres=gpu:a:2,gpu:b:2", "--ntasks-per-node=2", PRETRAIN, "r.yaml"],
            "tasks per node = GPUs per node fails: 2 != 4",
        ),
        (["--gpus-per-node=8", "--gres=tmpfs:9", PRETRAIN, "r.yaml"], "fails: 1 != 8"),
        (["--gres=tmpfs:9,gpu:2", PRETRAIN, "r.yaml"], "tasks per node = GPUs per node fails: 1"),
    ],
)
def test_nothing_is_submitted(submit, tmp_path, arguments, message) -> None:
    done = submit(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "nothing was submitted" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "submitted").exists()


def test_a_percent_sign_in_the_path_would_move_the_logs(submit, tmp_path) -> None:
    folder = tmp_path / "100%jobs"
    folder.mkdir()
    (folder / "r.yaml").write_text("")
    done = submit(PRETRAIN, "r.yaml", cwd=folder)
    assert done.returncode == 2 and f"{folder}, has a %" in done.stderr
    assert list(folder.iterdir()) == [folder / "r.yaml"]
    assert not (tmp_path / "submitted").exists()


def test_variables_of_a_job_around_it_are_not_handed_on(submit, tmp_path) -> None:
    mine = {"SLURM_CONF": "/c", "SLURM_CLUSTERS": "a", "SBATCH_ACCOUNT": "b", "PYTHON": "p"}
    outer = {"SLURM_JOB_ID": "3", "SLURM_RESTART_COUNT": "9", "SLURM_MEM_PER_NODE": "1"}
    outer |= {"SLURM_ARRAY_JOB_ID": "3", "SLURM_GPUS_PER_TASK": "1", "SLURM_CPU_BIND": "quiet"}
    fake_command(tmp_path, "sbatch", f"env >{tmp_path}/environment")
    assert submit(PRETRAIN, "r.yaml", **mine, **outer).returncode == 0
    seen = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    assert mine.items() <= seen.items() and not outer.keys() & seen.keys()


def test_torchrun_wants_one_task_per_node(submit, tmp_path) -> None:
    done = submit("--gpus-per-node=8", PRETRAIN, "r.yaml", VQMOE_LAUNCHER="torchrun")
    assert done.returncode == 0, done.stderr


def test_the_job_is_told_where_the_repository_is(tmp_path) -> None:
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
