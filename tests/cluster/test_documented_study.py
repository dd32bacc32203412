"""The tutorial's study, submitted as the tutorial does it: every run finishes, and is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from documented_pages import cut, harmless, make_folder, read_page
from slurm_job import END_SECONDS, ROOT, slurm


def test_the_tutorial_s_study_finishes_as_an_array(job_corpus, tmp_path) -> None:
    page = read_page((ROOT / "docs" / "tutorials" / "study.md").read_text("utf-8"))
    make_folder(tmp_path, job_corpus)
    for name, text in page.files.items():
        (tmp_path / name).write_text(cut(text))
    commands = [step.command for step in page.steps]
    (submit,) = [one for one in commands if "study submit" in one and harmless(one) != one]
    (status,) = [one for one in commands if "study status" in one]
    (report,) = [one for one in commands if "study report" in one]
    assert "4 runs: 4 waiting" in typed(submit, tmp_path)
    deadline = time.monotonic() + 4 * END_SECONDS
    (job,) = json.loads((tmp_path / "runs" / "first_study" / "slurm_jobs.json").read_text())
    while left := slurm("squeue", "--noheader", f"--jobs={job['job_id']}", "--format=%K %T"):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    assert "4 runs: 4 finished" in typed(status, tmp_path)
    typed(report, tmp_path)
    assert (tmp_path / "runs" / "first_study" / "report" / "report.md").is_file()


def typed(command: str, folder: Path) -> str:
    """Type a command of the page; what it printed."""
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "VQMOE_PREFLIGHT": "0",  # its own test is elsewhere
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
