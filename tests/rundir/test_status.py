"""status.json: every field comes back, readers never see half of it."""

import json
import os
import threading

import pytest

from vqmoe_megatron.rundir.status import STATES, RunStatus, read_status, write_status


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


def test_every_state_comes_back(tmp_path):
    assert read_status(tmp_path) is None
    for state in STATES:
        write_status(tmp_path / "run", state, 12, "because", "abc")
        assert read_status(tmp_path / "run") == RunStatus(state, 12, "because", "abc")
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {
        "state": "failed",
        "iteration": 12,
        "reason": "because",
        "mlflow_run_id": "abc",
        "slurm_job": None,
    }
    assert os.listdir(tmp_path / "run") == ["status.json"]


def test_a_job_and_an_array_task_are_named_as_slurm_names_them(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "43")
    write_status(tmp_path, "running", 0, "started")
    assert read_status(tmp_path).slurm_job == "43"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    write_status(tmp_path, "running", 0, "started")
    assert read_status(tmp_path).slurm_job == "40_3"


@pytest.mark.parametrize(("state", "iteration"), [("done", 1), ("completed", -1), ("failed", None)])
def test_an_illegal_status_is_refused_and_the_old_one_stays(tmp_path, state, iteration):
    write_status(tmp_path, "running", 0, "started")
    with pytest.raises(ValueError, match="status iteration|is not one of"):
        write_status(tmp_path, state, iteration, "")
    assert read_status(tmp_path) == RunStatus("running", 0, "started", None)


@pytest.mark.parametrize(
    "text", ["", "{", '{"state": "running"}', '{"state": "x", "iteration": 1}']
)
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ValueError, match=r"status\.json is not a run status"):
        read_status(tmp_path)


def test_a_reader_beside_a_writer_always_sees_a_whole_status(tmp_path):
    write_status(tmp_path, "running", 0, "x" * 5000)
    stop = threading.Event()

    def write_many():
        iteration = 0
        while not stop.is_set():
            iteration += 1
            write_status(tmp_path, "running", iteration, "x" * 5000)

    writer = threading.Thread(target=write_many)
    writer.start()
    seen = [read_status(tmp_path) for _ in range(2000)]
    stop.set()
    writer.join()
    iterations = [status.iteration for status in seen]
    assert iterations == sorted(iterations)
    assert all(len(status.reason) == 5000 for status in seen)


def test_a_status_that_is_no_text_is_named(tmp_path):
    (tmp_path / "status.json").write_bytes(b"\xd1\xff")
    with pytest.raises(ValueError, match="status.json is not a run status"):
        read_status(tmp_path)
