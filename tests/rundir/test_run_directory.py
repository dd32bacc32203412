"""The run directory proves it can be written, and failures keep their first cause."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from vqmoe_megatron.rundir import file_lock
from vqmoe_megatron.rundir.run_directory import RunDirectory, lock_patience_seconds
from vqmoe_megatron.rundir.status import RunStatus, read_status, write_status
from vqmoe_megatron.rundir.waiting import WaitNotices
from vqmoe_megatron.runtime.world import COLLECTIVE_TIMEOUT_MINUTES, RENDEZVOUS_SECONDS


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


def in_the_way(path, kind: str) -> None:
    """Put something in the place of a file or folder that a run writes."""
    if kind == "file":
        path.write_text("not ours")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(path.with_name("gone"))
    elif kind == "link to a file":
        path.with_name("a file").touch()
        path.symlink_to(path.with_name("a file"))
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a file", "pipe"])
def test_checkpoints_that_cannot_be_written_are_found_at_the_start(kind, tmp_path):
    run_dir = RunDirectory(tmp_path)
    in_the_way(run_dir.checkpoints, kind)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="checkpoints.* cannot be written: .*train.output_dir=DIR"):
        run_dir.create()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["checkpoints", ""])
def test_a_folder_that_takes_no_file_is_found_at_the_start(name, tmp_path, monkeypatch):
    run_dir = RunDirectory(tmp_path)
    run_dir.checkpoints.mkdir()
    written = Path.write_bytes

    def read_only(path, data):  # a real one takes the files of root
        if path.parent == tmp_path / name:
            raise OSError(errno.EROFS, "Read-only file system")
        return written(path, data)

    monkeypatch.setattr(Path, "write_bytes", read_only)
    with pytest.raises(ValueError, match="cannot be written: Read-only file system"):
        run_dir.create()


def test_checkpoints_may_be_a_link_to_a_folder(tmp_path):
    (tmp_path / "scratch").mkdir()
    run_dir = RunDirectory(tmp_path / "run")
    run_dir.create()
    run_dir.checkpoints.symlink_to(tmp_path / "scratch")
    run_dir.create()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_room_is_that_of_the_fuller_disk(tmp_path, monkeypatch):
    run_dir = RunDirectory(tmp_path)
    free = {run_dir.path: 5, run_dir.checkpoints: 3}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    assert run_dir.free_bytes() == 5
    run_dir.checkpoints.mkdir()
    assert run_dir.free_bytes() == 3


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "link to a file", "pipe"])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "status.json", "run_config.yaml", ".lock", "plots/loss.png"]
)
def test_what_stands_in_the_place_of_a_runs_file_is_found_at_the_start(name, kind, tmp_path):
    (tmp_path / "plots").mkdir()
    in_the_way(tmp_path / name, kind)
    what = "a link" if "link" in kind else "no file"
    with pytest.raises(ValueError, match=f"cannot be written: it is {what}; .*{name}"):
        RunDirectory(tmp_path).create()


def test_the_check_does_not_give_the_lock_back(tmp_path):
    run_dir = RunDirectory(tmp_path)
    held = run_dir.lock()
    run_dir.create()
    probe = [sys.executable, "-c", SECOND_RUN, str(tmp_path)]
    found = subprocess.run(probe, capture_output=True, text=True, check=True).stdout
    assert "another run is writing" in found
    held.close()


LOST = (
    "rank 0: RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:7",
    "rank 2: DistBackendError: NCCL error: remote process exited",
    "rank 3: SaveFailed: iteration 4 was not written: another rank could not write its part",
)
CAUSES = (
    "rank 1: OutOfMemoryError: CUDA out of memory",
    "rank 1: SystemExit: 3",
    "rank 1 ended with exit code 3",
)


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("cause", CAUSES)
def test_a_lost_peer_is_no_first_cause_whoever_writes_first(lost, cause, tmp_path):
    for order in ((lost, cause, LOST[0]), (cause, lost, LOST[1])):
        write_status(tmp_path, "running", 7, "training", "abc")
        for reason in order:
            RunDirectory(tmp_path).record_failure(reason)
        assert read_status(tmp_path) == RunStatus("failed", 7, cause, "abc")


def test_a_ranks_own_word_is_better_than_its_exit_code(tmp_path):
    RunDirectory(tmp_path).record_failure(LOST[0])
    RunDirectory(tmp_path).record_failure("rank 0 ended with exit code 1")
    assert read_status(tmp_path).reason == LOST[0]


def test_a_refusal_leaves_a_completed_run_as_it_is(tmp_path):
    write_status(tmp_path, "completed", 7, "all iterations done", "abc")
    before = (tmp_path / "status.json").read_bytes()
    run_dir = RunDirectory(tmp_path)
    run_dir.record_end(0, ValueError("a recipe that is refused"))
    run_dir.record_failure("rank 0 ended with exit code 2", is_refusal=True)
    assert (tmp_path / "status.json").read_bytes() == before
    run_dir.record_end(1, MemoryError())
    assert read_status(tmp_path) == RunStatus("failed", 7, "rank 1: MemoryError", "abc")


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
from vqmoe_megatron.rundir.run_directory import RunDirectory
try:
    RunDirectory(Path(sys.argv[1])).lock(wait_seconds=0.3)
    print("reserved")
except ValueError as error:
    print(error)
"""


FIRST_RUN = """
import sys, time
from pathlib import Path
from vqmoe_megatron.rundir.run_directory import RunDirectory
file = RunDirectory(Path(sys.argv[1])).lock()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    def second_run() -> str:  # the lock is between processes
        command = [sys.executable, "-c", SECOND_RUN, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    held = RunDirectory(tmp_path).lock()
    assert "another run is writing" in second_run()
    held.close()
    assert second_run() == "reserved"


def test_who_waits_for_a_directory_is_told_who_has_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(file_lock, "WaitNotices", partial(WaitNotices, first_seconds=0.0))
    command = [sys.executable, "-c", FIRST_RUN, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another run is writing to"):
            RunDirectory(tmp_path).lock(wait_seconds=0.1)
        process.kill()
    said = capsys.readouterr().err
    assert f"waiting for the lock {tmp_path / '.lock'}, held by process {process.pid} on" in said
    assert (tmp_path / ".lock").read_text() == ""


def test_a_forked_child_does_not_keep_the_directory(tmp_path):
    holder = """
import os, sys, time
from pathlib import Path
from vqmoe_megatron.rundir.run_directory import RunDirectory
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


def test_a_lock_leaves_the_file_of_its_name_as_it_was(tmp_path):
    (tmp_path / ".lock").write_text("notes")
    RunDirectory(tmp_path).lock(wait_seconds=0.0).close()
    assert (tmp_path / ".lock").read_text() == "notes"
