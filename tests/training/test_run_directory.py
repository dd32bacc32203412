"""The run directory proves it can be written, and failures keep their first cause."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from vqmoe_megatron.runtime.world import COLLECTIVE_TIMEOUT_MINUTES, RENDEZVOUS_SECONDS
from vqmoe_megatron.tracking.run_status import RunStatus, read_status, write_status
from vqmoe_megatron.training.run_directory import RunDirectory, lock_patience_seconds


def test_a_directory_is_made_and_left_without_a_trace(tmp_path):
    run_dir = RunDirectory(tmp_path / "a" / "b")
    run_dir.create()
    run_dir.create()
    assert list(run_dir.path.iterdir()) == []


def of_one_process_id(action) -> list[Exception]:
    """Call ``action`` often at the same time from threads, which share their process id."""
    failures: list[Exception] = []

    def rank() -> None:
        try:
            for _ in range(50):
                action()
        except Exception as error:
            failures.append(error)

    ranks = [threading.Thread(target=rank) for _ in range(8)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join()
    return failures


def test_ranks_of_one_process_id_on_other_nodes_do_not_collide(tmp_path):
    run_dir = RunDirectory(tmp_path)
    assert of_one_process_id(run_dir.create) == []
    assert list(tmp_path.iterdir()) == []
    write_status(tmp_path, "running", 7, "training", "abc")
    assert of_one_process_id(lambda: run_dir.record_failure("lost", is_first_cause=True)) == []
    assert read_status(tmp_path) == RunStatus("failed", 7, "lost", "abc")
    assert os.listdir(tmp_path) == ["status.json"]


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


SECOND_RUN = """
import sys
from pathlib import Path
from vqmoe_megatron.training.run_directory import RunDirectory
try:
    RunDirectory(Path(sys.argv[1])).lock(wait_seconds=0.3)
    print("reserved")
except ValueError as error:
    print(error)
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    def second_run() -> str:  # the lock is between processes
        command = [sys.executable, "-c", SECOND_RUN, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    held = RunDirectory(tmp_path).lock()
    assert "another run is writing" in second_run()
    held.close()
    assert second_run() == "reserved"


def test_a_forked_child_does_not_keep_the_directory(tmp_path):
    holder = """
import os, sys, time
from pathlib import Path
from vqmoe_megatron.training.run_directory import RunDirectory
file = RunDirectory(Path(sys.argv[1])).lock()
child = os.fork()
if child == 0:
    time.sleep(20)
    os._exit(0)
print(child, flush=True)
os._exit(0)
"""
    command = [sys.executable, "-c", holder, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        child = int(process.stdout.readline())
        process.wait()
        try:
            probe = [sys.executable, "-c", SECOND_RUN, str(tmp_path)]
            found = subprocess.run(probe, capture_output=True, text=True, check=True).stdout
        finally:
            os.kill(child, signal.SIGKILL)
    assert found.strip() == "reserved"


def test_a_requeued_attempt_waits_longer_for_the_last_ones_ranks() -> None:
    assert lock_patience_seconds({}) == lock_patience_seconds({"SLURM_RESTART_COUNT": "0"}) == 30.0
    requeued = lock_patience_seconds({"SLURM_RESTART_COUNT": "2"})
    assert COLLECTIVE_TIMEOUT_MINUTES * 60 >= RENDEZVOUS_SECONDS > requeued > 500.0
