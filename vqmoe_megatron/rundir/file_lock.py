"""Taking a lock file in bounded time, and naming who holds it meanwhile.

Two kinds, which do not see each other; a file keeps its kind for ever, since other releases may
hold it. ``fcntl.lockf`` belongs to the process: a fork does not inherit it, so Megatron's
checkpoint writers cannot keep a run's directory (``.lock``, ``.run.lock``). ``fcntl.flock``
belongs to the open file: another opening in the same process is kept out too (``.prepare.lock``,
that of an MLflow database).

Who takes a lock of its own file writes itself into it. The kernel's own list comes first: it also
knows programs that write nothing, and a process that was stopped or forgot to end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from vqmoe_megatron.rundir.waiting import WaitNotices, tell

RETRY_SECONDS = 0.05
KERNEL_LOCKS = Path("/proc/locks")
_IS_HELD = (errno.EACCES, errno.EAGAIN)


class LockHeld(TimeoutError):
    """Another process kept the lock; ``holder`` says which, as far as it can be known."""

    def __init__(self, path: str, holder: str, seconds: float) -> None:
        super().__init__(
            f"the lock {path} has been held by {holder} for {seconds:g} s; wait for that process "
            "or end it, then try again"
        )
        self.holder = holder


@dataclass(frozen=True)
class LockWait:
    """How long a lock is waited for, and who is told meanwhile."""

    patience_seconds: float = 60.0
    say: Callable[[str], None] = tell


def wait_for_lock(
    file: TextIO, take: Callable[[int, int], None] = fcntl.flock, wait: LockWait | None = None
) -> None:
    """Take the lock on ``file``, opened for reading and writing, and write this process into it.

    See :func:`poll_lock`.
    """
    poll_lock(file, take, wait or LockWait())
    with contextlib.suppress(OSError):  # a full disk must not keep anyone from the lock
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def poll_lock(file: TextIO, take: Callable[[int, int], None], wait: LockWait) -> None:
    """Take the lock on ``file``, which stays as it is; closing it gives the lock back.

    Args:
        take: ``fcntl.flock`` or ``fcntl.lockf``.

    Raises:
        LockHeld: when another process keeps it for longer than the patience.
        OSError: when the file system has no such locks.
    """
    notices = WaitNotices(wait.say)
    deadline = time.monotonic() + wait.patience_seconds
    while not try_lock(file, take):
        if time.monotonic() >= deadline:
            raise LockHeld(file.name, lock_holder(file), wait.patience_seconds)
        notices.look(
            lambda: (
                f"waiting for the lock {file.name}, held by {lock_holder(file)}; at most "
                f"{wait.patience_seconds:g} s"
            )
        )
        time.sleep(RETRY_SECONDS)


def try_lock(file: TextIO, take: Callable[[int, int], None]) -> bool:
    """Take the lock on ``file`` if nobody holds it; tell whether it was taken.

    Raises:
        OSError: when the file system has no such locks.
    """
    try:
        take(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _IS_HELD:
            return False
        raise
    return True


def is_held(path: Path, take: Callable[[int, int], None]) -> bool:
    """Tell whether another process holds the lock on a file; it is never made, nor its lock kept.

    Not for a process that holds it: closing a file ends all POSIX locks a process has on it.

    Raises:
        OSError: when the file cannot be opened, or its file system has no such locks.
    """
    try:
        with path.open("r+", encoding="utf-8") as file:
            return not try_lock(file, take)
    except FileNotFoundError:
        return False


def lock_holder(file: TextIO) -> str:
    """Return who holds the lock on ``file``: by the kernel's list, else by what the file says."""
    known = kernel_lock_holder(os.fstat(file.fileno()))
    if known is not None:
        return known
    try:
        file.seek(0)
        return file.read(200).strip() or "another process"
    except (OSError, ValueError):
        return "another process"


def kernel_lock_holder(status: os.stat_result) -> str | None:
    """Return who holds any lock on a file, by the kernel's list; None when it is not there.

    The file is not opened: closing a file ends all POSIX locks this process has on it.
    """
    number = _holding_process(status)
    if number is None:
        return None
    try:
        name = Path(f"/proc/{number}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return f"a child of process {number}, which has ended"
    return f"process {number} on {socket.gethostname()} ({name})"


def _holding_process(status: os.stat_result) -> int | None:
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        lines = KERNEL_LOCKS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:  # 1: FLOCK  ADVISORY  WRITE 4711 fd:00:131 0 EOF; who waits is marked ->
        words = line.split()
        if len(words) > 5 and words[1] != "->" and words[5] == place and int(words[4]) > 0:
            return int(words[4])
    return None
