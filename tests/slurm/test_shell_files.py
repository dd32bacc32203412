"""Every shell file of launchers/ and slurm/: short, legal, clean for shellcheck, with a usage."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    str(path.relative_to(ROOT))
    for folder in ("launchers", "slurm", ".ci")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".sh", ".sbatch") or path.name == "run"
)
SOURCED = [name for name in FILES if (ROOT / name).read_text().startswith("# shellcheck shell=")]
COMMANDS = [name for name in FILES if name not in SOURCED and name != ".ci/run"]
MAX_LINES = 100


def test_the_scan_sees_the_files() -> None:
    assert {"slurm/pretrain.sbatch", "slurm/cluster/up.sh", ".ci/run"} <= set(FILES)
    assert "launchers/slurm.sh" in SOURCED and "launchers/local.sh" in COMMANDS


@pytest.mark.parametrize("name", FILES)
def test_file_is_short_and_parses(name) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert len(text.splitlines()) < MAX_LINES
    assert max(map(len, text.splitlines())) <= 120
    assert subprocess.run(["bash", "-n", str(ROOT / name)]).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_command_stops_at_errors_and_explains_itself(name) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert (ROOT / name).stat().st_mode & 0o111, "not executable"
    helped = subprocess.run(
        [str(ROOT / name), "--help"], capture_output=True, text=True, timeout=60
    )
    assert helped.returncode == 0, helped.stderr
    assert "usage: " in helped.stdout and "example" in helped.stdout


@pytest.mark.parametrize("name", SOURCED)
def test_sourced_file_is_not_executable(name) -> None:
    assert not (ROOT / name).stat().st_mode & 0o111


@pytest.mark.parametrize(
    "name", ["slurm/pretrain.sbatch", "slurm/study.sbatch", "slurm/mlflow.sbatch"]
)
@pytest.mark.parametrize("arguments", [[], ["a.yaml"]])
def test_job_script_outside_a_job_is_a_usage_error(name, arguments) -> None:
    done = subprocess.run(
        [str(ROOT / name), *arguments],
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("usage: sbatch ")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say() -> None:
    done = subprocess.run(
        ["shellcheck", "-x", *FILES], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout
