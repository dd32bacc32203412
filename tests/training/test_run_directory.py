"""The run directory proves it can be written, and failures keep their first cause."""

from __future__ import annotations

import pytest

from vqmoe_megatron.tracking.run_status import read_status, write_status
from vqmoe_megatron.training.run_directory import RunDirectory


def test_a_directory_is_made_and_left_without_a_trace(tmp_path):
    run_dir = RunDirectory(tmp_path / "a" / "b")
    run_dir.create()
    run_dir.create()
    assert list(run_dir.path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "inside"])
def test_a_file_in_the_way_is_refused(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="train.output_dir=.*cannot be written"):
        RunDirectory(tmp_path / "file" / below).create()


def test_the_first_failure_keeps_its_reason_unless_the_cause_is_known(tmp_path):
    run_dir = RunDirectory(tmp_path)
    run_dir.record_failure("before any status")
    assert read_status(tmp_path).iteration == 0
    write_status(tmp_path, "running", 7, "training", "abc")
    run_dir.record_failure("rank 0: connection closed")
    run_dir.record_failure("rank 2: connection closed")
    status = read_status(tmp_path)
    assert (status.state, status.reason) == ("failed", "rank 0: connection closed")
    assert (status.iteration, status.mlflow_run_id) == (7, "abc")
    run_dir.record_failure("rank 1 was killed by SIGKILL", is_first_cause=True)
    assert read_status(tmp_path).reason == "rank 1 was killed by SIGKILL"


def test_a_second_run_is_refused_until_the_first_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("vqmoe_megatron.training.run_directory.LOCK_WAIT_SECONDS", 0.3)
    directory = RunDirectory(tmp_path)
    held = directory.lock()
    with pytest.raises(ValueError, match="another run is writing"):
        directory.lock()
    held.close()
    directory.lock().close()
