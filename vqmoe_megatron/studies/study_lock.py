"""One command at a time starts runs of a study: a POSIX lock on ``OUTPUT_DIR/.run.lock``.

The kernel lets go of it when its process ends, however it ends. The runs do not inherit it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN_LOCK = ".run.lock"
PATIENCE_SECONDS = 1.0  # `vqmoe study status` holds the lock for an instant when it asks
RETRY_SECONDS = 0.05


@contextmanager
def study_lock(output_dir: Path) -> Iterator[None]:
    """Hold the lock of a study's directory, which is made if it is not there.

    Raises:
        ValueError: when another process holds it, or the directory cannot be written.
    """
    path = output_dir / RUN_LOCK
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"study.output_dir={output_dir} cannot be written: {error.strerror}; choose another"
        ) from error
    with file:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not _is_taken(file.fileno(), path):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ValueError(
                    f"runs of study {output_dir} are being started by {holder}; wait for it, or "
                    "stop it first"
                )
            time.sleep(RETRY_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def is_study_locked(output_dir: Path) -> bool:
    """Tell whether another process holds the lock; never makes a file."""
    path = output_dir / RUN_LOCK
    try:
        with path.open("r+", encoding="utf-8") as file:
            return not _is_taken(file.fileno(), path)
    except (OSError, ValueError):  # none yet, or one we may not ask
        return False


def _is_taken(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise ValueError(f"{path} cannot be locked: {error.strerror}") from error
    return True
