"""The lock of a study: one command starts runs, the others are told or wait."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from vqmoe_megatron.cli import study as commands
from vqmoe_megatron.study.study import load_study
from vqmoe_megatron.study.study_lock import is_study_locked, study_lock

HOLDER = """
import sys, time
from pathlib import Path
from vqmoe_megatron.study.study_lock import study_lock
with study_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def holder(folder: Path, seconds: float):
    """Another process that holds the lock; POSIX locks do not stop their own process."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_the_lock_is_seen_and_ends_with_its_process(tmp_path) -> None:
    assert not is_study_locked(tmp_path / "none") and not (tmp_path / "none").exists()
    with holder(tmp_path / "s", 600) as process:
        assert is_study_locked(tmp_path / "s")
        with pytest.raises(ValueError, match=f"being started by process {process.pid} on "):
            with study_lock(tmp_path / "s"):
                pass
        process.kill()
        process.wait()
        assert not is_study_locked(tmp_path / "s")
        with study_lock(tmp_path / "s"):
            pass


def test_a_second_study_run_is_refused_before_any_work(write_study, vqmoe) -> None:
    path = write_study(grid={"experts": [4]})
    study = load_study(path)
    with holder(study.folder.path, 600):
        code, shown = vqmoe("study", "run", path)
    assert code == 2 and len(shown.splitlines()) == 1 and "being started by process" in shown
    assert not study.folder.runs_file.exists() and not study.runs[0].run_dir.exists()


def test_a_submission_waits_for_no_one(write_study, vqmoe, monkeypatch, tmp_path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho called > $0.log\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    path = write_study(grid={"experts": [4]})
    with holder(load_study(path).folder.path, 600):
        code, shown = vqmoe("study", "submit", path)
    assert code == 2 and "being started by process" in shown
    assert not (tmp_path / "sbatch.log").exists()


def test_a_watch_lasts_while_the_lock_is_held(write_study, vqmoe, monkeypatch) -> None:
    monkeypatch.setattr(commands, "WATCH_SECONDS", 0.1)
    path = write_study(grid={"experts": [4]})
    seconds = 1.5
    with holder(load_study(path).folder.path, seconds) as process:
        start = time.monotonic()
        code, _ = vqmoe("study", "status", path, "--watch")
        assert code == 0 and time.monotonic() - start > seconds / 2
        assert process.wait(30) == 0
