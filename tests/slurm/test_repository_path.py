"""The batch scripts find their repository by what Slurm says of the job, in any path."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from shell_run import ROOT, fake_command

SCRIPTS = ["pretrain", "study", "mlflow"]
PLACES = [
    "repo",
    "my repo",
    'it\'s "mine"',
    "ünï 文",
    "a/slurm/b",
    "slurm",
    "slurm/slurm/slurm",
    "$HOME `x`",
    "x*y?",
    "back\\slash",
    "a=b Command=c",
]
ARGUMENTS = ["small.yaml", "/other/slurm/pretrain.sbatch", "a key=v w", "*"]


@pytest.fixture
def run_copy(tmp_path):
    """``run_copy(name, command)``: run the copy that Slurm makes; scontrol tells ``command``."""
    tools = tmp_path / "tools"
    tools.mkdir()
    fake_command(tools, "sleep", "exec /usr/bin/sleep 0.01")

    def run(name: str, command: str, body: str | None = None, **environment: str):
        (tools / "record").write_text(f"JobId=7 JobName=x\n   Command={command}\n   WorkDir=/tmp\n")
        fake_command(tools, "scontrol", body or f"cat '{tools}/record'")
        copy = tmp_path / "slurm_script"
        shutil.copy(ROOT / "slurm" / f"{name}.sbatch", copy)
        job = {"SLURM_JOB_ID": "7"}
        if name == "study":
            job |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0"}
        return subprocess.run(
            ["bash", str(copy), "an argument"],
            cwd=tmp_path,
            env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": "/nonexistent", **job, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


def make_repository(root: Path) -> Path:
    """Only what the scripts source: it says where it was found."""
    (root / "launchers").mkdir(parents=True)
    said = 'echo "found [$1]"; exit 0'
    (root / "launchers" / "slurm.sh").write_text(f"start_job() {{ {said}; }}\n")
    (root / "launchers" / "slurm_world.sh").write_text(f"load_site() {{ {said}; }}\n")
    (root / "launchers" / "mlflow_server.sh").write_text("")
    return root


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SCRIPTS)
def test_any_path_is_found(run_copy, tmp_path, name, place) -> None:
    root = make_repository(tmp_path / place)
    done = run_copy(name, f"{root}/slurm/{name}.sbatch {' '.join(ARGUMENTS)}")
    assert done.stdout == f"found [{root}]\n", done.stderr


def test_the_user_s_own_word_comes_first(run_copy, tmp_path) -> None:
    root = make_repository(tmp_path / "my repo")
    done = run_copy("pretrain", "/nowhere/slurm/pretrain.sbatch", VQMOE_ROOT=str(root))
    assert done.stdout == f"found [{root}]\n"


@pytest.mark.parametrize("command", ["(null)", "", "/some where/job.sh", "/some where/slurm/x.sh"])
def test_a_copy_from_elsewhere_says_so(run_copy, command) -> None:
    done = run_copy("pretrain", command)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(
        f"error: no launchers/slurm.sh in '{command.split('/slurm/')[0]}'"
    )
    assert "set VQMOE_ROOT" in done.stderr


def test_a_controller_that_is_away_is_waited_for_and_said(run_copy, tmp_path) -> None:
    root = make_repository(tmp_path / "repo")
    tries = tmp_path / "tries"
    body = (
        f"echo x >>'{tries}'; (($(wc -l <'{tries}') > 2)) || exit 1\n"
        f"echo '   Command={root}/slurm/pretrain.sbatch a.yaml'"
    )
    done = run_copy("pretrain", "", body)
    assert done.stdout == f"found [{root}]\n"
    said = done.stderr.splitlines()
    assert len(said) == 2 and "waiting for Slurm's controller" in said[0] and "job 7" in said[0]
    assert "try 2 of 30" in said[1]


def test_the_three_scripts_look_in_the_same_way() -> None:
    """They cannot share a file before they know where it is."""
    parts = set()
    for name in SCRIPTS:
        text = (ROOT / "slurm" / f"{name}.sbatch").read_text()
        start = text.index("# Slurm runs a copy of this file")
        parts.add(text[start : text.index("# shellcheck source=launchers/", start)])
    assert len(parts) == 1
