"""One command at a time starts runs of a study: a POSIX lock on ``OUTPUT_DIR/.run.lock``.

The kernel lets go of it when its process ends, however it ends. The runs do not inherit it.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vqmoe_megatron.rundir.file_lock import LockHeld, LockWait, is_held, wait_for_lock
from vqmoe_megatron.rundir.waiting import tell_nobody

RUN_LOCK = ".run.lock"
PATIENCE_SECONDS = 1.0  # `vqmoe study status` holds the lock for an instant when it asks


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
        try:
            wait_for_lock(file, fcntl.lockf, LockWait(PATIENCE_SECONDS, tell_nobody))
        except LockHeld as held:
            raise ValueError(
                f"runs of study {output_dir} are being started by {held.holder}; wait for it, or "
                "stop it first"
            ) from held
        except OSError as error:
            raise ValueError(f"{path} cannot be locked: {error.strerror}") from error
        yield


def is_study_locked(output_dir: Path) -> bool:
    """Tell whether another process holds the lock; never makes a file."""
    try:
        return is_held(output_dir / RUN_LOCK, fcntl.lockf)
    except OSError:  # one we may not ask
        return False
