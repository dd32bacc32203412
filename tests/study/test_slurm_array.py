"""What submit would call and refuses, and which tasks of a queue belong to a study. The commands
answer as Slurm's do; real arrays and queues are in tests/cluster."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from vqmoe_megatron.rundir.status import write_status
from vqmoe_megatron.study import slurm_array
from vqmoe_megatron.study.slurm_array import (
    Array,
    QueueUnknown,
    arrays_of,
    index_ranges,
    job_name,
    name_in_queue,
    queued_tasks,
    sbatch_command,
    submit_arrays,
    submitted_jobs,
)
from vqmoe_megatron.study.study import load_study


@pytest.mark.parametrize(
    ("indices", "text"),
    [([0], "0"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 7, 8, 9], "0,2-3,7-9"), ([4, 6], "4,6")],
)
def test_index_ranges(indices, text) -> None:
    assert index_ranges(indices) == text


def test_runs_of_other_numbers_of_ranks_get_arrays_of_their_own(write_study) -> None:
    study = load_study(write_study(grid={"ranks": [2, 1], "seed": [1, 2, 3]}))
    assert arrays_of(study, [5, 0, 1, 2, 4]) == [Array((4, 5), 1), Array((0, 1, 2), 2)]


def test_the_users_options_come_last_and_a_second_array_waits(write_study, tmp_path) -> None:
    study = load_study(write_study())
    script = tmp_path / "study.sbatch"
    array = Array((0, 2), 8)
    command = sbatch_command(study, array, script, 3, ["--ntasks=4", "--partition=x"], after="77")
    assert command[:2] == ["sbatch", "--parsable"]
    assert {"--array=0,2%3", "--ntasks=8", "--dependency=afterany:77"} <= set(command)
    assert command[-4:] == [
        "--ntasks=4",
        "--partition=x",
        str(script),
        str(study.folder.study_copy),
    ]
    assert f"--job-name={job_name(study)}" in command


def test_a_percent_sign_of_the_folder_is_no_pattern_of_slurm(write_study, tmp_path) -> None:
    study = load_study(write_study(study={"output_dir": str(tmp_path / "100%A %j")}))
    command = sbatch_command(study, Array((0,), 1), tmp_path / "study.sbatch", 3, [])
    (output,) = [text for text in command if text.startswith("--output=")]
    assert output == f"--output={tmp_path}/100%%A %%j/logs/slurm-%A_%a.log"


def test_a_job_around_the_submission_is_not_handed_on(
    write_study, vqmoe, monkeypatch, tmp_path
) -> None:
    for name, body in (("sbatch", f"env >{tmp_path}/seen; echo 77"), ("squeue", "echo tiny")):
        (tmp_path / name).write_text(f"#!/bin/sh\n[ $# = 0 ] || {body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_GPUS_PER_NODE", "SLURM_CONF"):
        monkeypatch.setenv(name, "9")
    code, shown = vqmoe("study", "submit", write_study(grid={"experts": [4]}))
    assert code == 0 and "submitted job 77" in shown, shown
    seen = (tmp_path / "seen").read_text().splitlines()
    assert [line for line in seen if line.startswith("SLURM_")] == ["SLURM_CONF=9"]


def test_two_studies_of_one_name_have_other_job_names(write_study, tmp_path) -> None:
    one = load_study(write_study())
    two = load_study(write_study(study={"output_dir": str(tmp_path / "elsewhere")}))
    assert job_name(one) != job_name(two)


def test_a_dry_run_prints_and_leaves_nothing(write_study, vqmoe, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")  # no Slurm needed
    path = write_study()
    study = load_study(path)
    write_status(study.runs[1].run_dir, "completed", 8, "done")
    write_status(study.runs[2].run_dir, "requeue", 5, "stopped")
    code, shown = vqmoe("study", "submit", path, "--dry-run", "--max-parallel", "2", "--", "-pgpu")
    assert code == 0, shown
    lines = shown.splitlines()
    assert lines[0] == "4 runs: 1 finished, 1 stopped, 2 waiting"
    assert lines[1].split() == ["index", "run", "state", "ranks", "iteration"]
    rows = [line.split() for line in lines[2:5]]
    assert [(row[0], row[2]) for row in rows] == [
        ("0", "waiting"),
        ("2", "stopped"),
        ("3", "waiting"),
    ]
    assert rows[1] == ["2", study.runs[2].name, "stopped", str(study.runs[2].num_ranks), "5/8"]
    assert lines[5].startswith("sbatch --parsable") and "--array=0,2-3%2" in lines[5]
    assert lines[5].endswith(f"-pgpu slurm/study.sbatch {study.folder.study_copy}")
    assert lines[6:] == ["dry run: nothing submitted"]
    assert [entry.name for entry in study.folder.path.iterdir()] == ["runs"]


def test_without_sbatch_nothing_is_submitted(write_study, vqmoe, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    path = write_study()
    code, shown = vqmoe("study", "submit", path)
    assert code == 2 and len(shown.splitlines()) == 1
    assert "no sbatch on PATH, so nothing was submitted" in shown
    assert not load_study(path).folder.path.exists()


def test_a_queue_that_cannot_be_asked_stops_a_submission(write_study, vqmoe, monkeypatch) -> None:
    if shutil.which("sbatch") is None:
        pytest.skip("Slurm's commands are not installed")
    monkeypatch.setenv("SLURM_CONF", "/no/such/slurm.conf")
    monkeypatch.setattr(slurm_array, "SQUEUE_SECONDS", 3)  # it looks for a server, in vain
    path = write_study()
    code, shown = vqmoe("study", "submit", path)
    assert code == 2 and "nothing was submitted" in shown
    assert not load_study(path).folder.study_copy.exists()


def test_a_finished_study_has_nothing_to_submit(write_study, vqmoe, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    path = write_study()
    for run in load_study(path).runs.values():
        write_status(run.run_dir, "completed", 8, "done")
    code, shown = vqmoe("study", "submit", path, "--dry-run")
    assert (code, shown) == (0, "4 runs: 4 finished\nnothing to submit\n")


def test_a_bad_study_is_not_submitted(write_study, vqmoe) -> None:
    code, shown = vqmoe("study", "submit", write_study(more=["vq.num_code=3"]))
    assert code == 2 and "did you mean vq.num_codes" in shown


def test_damaged_job_ids_are_not_taken_for_none(write_study) -> None:
    study = load_study(write_study())
    study.start()
    assert submitted_jobs(study.folder) == []
    study.folder.slurm_jobs.write_text("[{}]")
    with pytest.raises(ValueError, match="slurm_jobs.json is damaged"):
        submitted_jobs(study.folder)


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
