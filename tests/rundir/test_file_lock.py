"""Locks are waited for in bounded time, and the message says who has them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from vqmoe_megatron.rundir import file_lock
from vqmoe_megatron.rundir.file_lock import LockHeld, LockWait, is_held, lock_holder, wait_for_lock

HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(float(sys.argv[3]))
"""


@contextmanager
def holder(path, kind: str = "flock", seconds: float = 600.0):
    command = [sys.executable, "-c", HOLDER, str(path), kind, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_lock_that_stays_is_given_up_and_its_process_named(tmp_path, kind) -> None:
    said: list[str] = []
    path = tmp_path / "a b?.lock"
    with holder(path, kind) as process, path.open("a+") as file:
        started = time.monotonic()
        with pytest.raises(LockHeld) as caught:
            wait_for_lock(file, getattr(fcntl, kind), LockWait(3.5, said.append))
        assert 3.5 <= time.monotonic() - started < 30
    assert f"held by process {process.pid} on " in str(caught.value)
    assert str(path) in str(caught.value) and "(python" in str(caught.value)
    assert len(said) == 1 and f"held by process {process.pid} on " in said[0]
    assert "at most 3.5 s" in said[0]


def test_a_lock_that_is_given_back_is_taken(tmp_path) -> None:
    path = tmp_path / "lock"
    with holder(path, seconds=0.5), path.open("a+") as file:
        wait_for_lock(file, fcntl.flock, LockWait(60.0))
        assert path.read_text().startswith(f"process {os.getpid()} on ")
        with path.open("a+") as other, pytest.raises(LockHeld, match=f"process {os.getpid()} on"):
            wait_for_lock(other, fcntl.flock, LockWait(0.0))
    with path.open("a+") as file:  # closing it gave it back
        wait_for_lock(file, fcntl.flock, LockWait(0.0))


def test_the_kernel_knows_more_than_the_file(tmp_path, monkeypatch) -> None:
    """flock(1) and a stopped process write nothing; another machine's lock is in no list here."""
    path = tmp_path / "lock"
    path.write_text("process 7 on elsewhere\n")
    with holder(path) as process, path.open("a+") as file:
        assert lock_holder(file).startswith(f"process {process.pid} on ")
        monkeypatch.setattr(file_lock, "KERNEL_LOCKS", tmp_path / "none")
        assert lock_holder(file) == "process 7 on elsewhere"
        path.write_bytes(b"\xff")
        assert lock_holder(file) == "another process"
        path.write_text("")
        assert lock_holder(file) == "another process"


def test_a_waiter_does_not_wipe_out_the_holder_s_name(tmp_path) -> None:
    path = tmp_path / "lock"
    with path.open("a+") as file, path.open("a+") as other:
        wait_for_lock(file)
        with pytest.raises(LockHeld):
            wait_for_lock(other, fcntl.flock, LockWait(0.0))
        assert path.read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_asking_for_a_lock_neither_makes_nor_changes_nor_keeps_it(tmp_path, kind) -> None:
    take, path = getattr(fcntl, kind), tmp_path / "lock"
    assert not is_held(path, take) and not path.exists()
    path.write_text("notes")
    with holder(path, kind):
        assert is_held(path, take)
        other = fcntl.flock if kind == "lockf" else fcntl.lockf
        assert not is_held(path, other)  # a file keeps its kind
    assert not is_held(path, take)
    with holder(path, kind):  # the question did not keep it
        assert path.read_text() == "notes"


def test_a_file_system_without_locks_is_no_held_lock(tmp_path) -> None:
    def no_locks(*_) -> None:
        raise OSError(95, "Operation not supported")

    with (tmp_path / "lock").open("a+") as file, pytest.raises(OSError, match="not supported"):
        wait_for_lock(file, no_locks, LockWait(0.0))
