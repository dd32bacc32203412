"""Which tasks of a queue belong to a study. The commands answer as Slurm's do; real queues are in
tests/cluster."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vqmoe_megatron.study.slurm_array import arrays_of, submit_arrays
from vqmoe_megatron.study.slurm_queue import (
    QueueUnknown,
    job_name,
    name_in_queue,
    queued_tasks,
    submitted_jobs,
)
from vqmoe_megatron.study.study import load_study


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """``answer(command, text, code)`` has a command of Slurm print ``text`` and end with ``code``;
    what it was called with goes to the returned file."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(command: str, text: str, code: int = 0) -> Path:
        (folder / f"{command}.out").write_text(text)
        script = f'#!/bin/sh\necho "$@" >>{folder}/{command}.called\n'
        script += f"cat {folder}/{command}.out\n" + (f"cat {folder}/{command}.out >&2\n" * code)
        (folder / command).write_text(f"{script}exit {code}\n")
        (folder / command).chmod(0o755)
        return folder / f"{command}.called"

    return write


def test_an_id_counts_only_with_the_name_it_was_submitted_under(write_study, answer) -> None:
    study = load_study(write_study())
    study.start()
    recorded = [{"job_id": "7", "job_name": "renamed"}, {"job_id": "8", "job_name": "tiny"}]
    study.folder.slurm_jobs.write_text(json.dumps(recorded))
    answer(
        "squeue",
        "7|0|PENDING|of another study\n"  # the cluster was built again and counts from 1
        "8|1|PENDING|renamed\n"
        "7|1|RUNNING|renamed\n"
        f"9|2|PENDING|{job_name(study)}\n"
        "7|N/A|PENDING|renamed\n",
    )
    assert queued_tasks(study) == {1: "7_1 RUNNING", 2: "9_2 PENDING"}


def test_the_name_that_slurm_knows_is_recorded(write_study, answer, tmp_path) -> None:
    study = load_study(write_study())
    study.start()
    arrays, said = arrays_of(study, [0, 1]), []
    answer("sbatch", "41;cluster\n")
    asked = answer("squeue", "renamed\nrenamed\n")
    submit_arrays(study, arrays, tmp_path / "s", 1, ["-J", "renamed"], said.append)
    assert submitted_jobs(study.folder) == [("41", "renamed")] and len(said) == 2
    assert "--jobs=41" in asked.read_text()

    answer("sbatch", "42\n")
    answer("squeue", "slurm_load_jobs error: Unable to contact slurm controller\n", 1)
    submit_arrays(study, arrays, tmp_path / "s", 1, [], said.append)
    assert submitted_jobs(study.folder) == [("41", "renamed"), ("42", job_name(study))]
    assert f"the name of job 42, recorded as {job_name(study)}: slurm_load_jobs error" in said[3]


def test_a_job_that_slurm_does_not_list_has_no_name(answer) -> None:
    answer("squeue", "")
    with pytest.raises(QueueUnknown, match="does not list job 41"):
        name_in_queue("41")
