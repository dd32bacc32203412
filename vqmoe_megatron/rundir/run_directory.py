"""One object for every path of a run directory, for writers and readers alike."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from vqmoe_megatron.rundir.file_lock import LockHeld, LockWait, poll_lock
from vqmoe_megatron.rundir.file_names import (
    BAD_BATCHES_FILE,
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    LOCK_FILE,
    ROUTING_FILE,
    WRITTEN_FILES,
)
from vqmoe_megatron.rundir.status import CONSEQUENCE, read_status, write_status

LOCK_WAIT_SECONDS = 30.0
REQUEUED_LOCK_WAIT_SECONDS = 570.0  # less than the other ranks wait for this one


def lock_patience_seconds(environ: Mapping[str, str] = os.environ) -> float:
    """How long a starting attempt waits for the directory.

    After a dead node Slurm starts the next attempt elsewhere, while ranks of the last one may hang
    in a collective until it times out.
    """
    was_requeued = environ.get("SLURM_RESTART_COUNT", "0") != "0"
    return REQUEUED_LOCK_WAIT_SECONDS if was_requeued else LOCK_WAIT_SECONDS


@dataclass(frozen=True)
class RunDirectory:
    """The layout of ``train.output_dir``."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved recipe."""
        return self.path / CONFIG_FILE

    @property
    def checkpoints(self) -> Path:
        """Holds ``iter_0000100/`` folders and the tracker file."""
        return self.path / CHECKPOINTS_DIR

    @property
    def routing(self) -> Path:
        """Expert load and code usage of the last logged steps."""
        return self.path / ROUTING_FILE

    @property
    def bad_batches(self) -> Path:
        """One line for every step with a non-finite loss or gradient."""
        return self.path / BAD_BATCHES_FILE

    def create(self) -> None:
        """Make the directory and prove that it and its checkpoints can be written. For any rank.

        Raises:
            ValueError: when it cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _prove_writable(self.path)
            for path in map(self.path.joinpath, WRITTEN_FILES):
                _prove_replaceable(path)
        except OSError as error:
            raise ValueError(
                f"train.output_dir={self.path} cannot be written: {_what(error)}; choose another "
                "with train.output_dir=DIR"
            ) from error
        if os.path.lexists(self.checkpoints):  # perhaps a link to another disk
            try:
                _prove_writable(self.checkpoints)
            except OSError as error:
                link = self.checkpoints.is_symlink()
                target = f", a link to {os.readlink(self.checkpoints)}," if link else ""
                raise ValueError(
                    f"{self.checkpoints}{target} cannot be written: {error.strerror}; make it a "
                    "directory that can be, or choose another train.output_dir=DIR"
                ) from error

    def free_bytes(self) -> int:
        """Room where it is least: for the logs, or for checkpoints, which may lie on another disk.

        Raises:
            OSError: when the directory is not there.
        """
        return min(shutil.disk_usage(self.path).free, self.checkpoints_free_bytes())

    def checkpoints_free_bytes(self) -> int:
        """Room for checkpoints, whose folder may not be there yet."""
        place = self.checkpoints if self.checkpoints.exists() else self.path
        return shutil.disk_usage(place).free

    def lock(self, wait_seconds: float = LOCK_WAIT_SECONDS) -> TextIO:
        """Reserve the directory for this run; closing the returned file gives it back.

        A POSIX record lock: it ends with the process, however that ends, and is not inherited by
        Megatron's forked checkpoint writers, which can outlive a killed rank. An earlier attempt
        that is still saving gets ``wait_seconds``. A file system without locks is reported and
        the run goes on.

        Raises:
            ValueError: when another run keeps it.
        """
        file = (self.path / LOCK_FILE).open("a")
        try:
            poll_lock(file, fcntl.lockf, LockWait(wait_seconds))
        except LockHeld as held:
            file.close()
            raise ValueError(
                f"another run is writing to train.output_dir={self.path}; wait for it or "
                "choose another directory"
            ) from held
        except OSError as error:
            print(f"{self.path} cannot be locked ({error}): a second run would not be noticed")
        return file

    def record_end(self, rank: int, error: BaseException) -> None:
        """Set the status to failed by what ``rank`` raised; see :meth:`record_failure`."""
        failures = getattr(error, "failures", None)  # by rank, of torch's CheckpointException
        text = "; ".join(repr(cause) for cause, _ in failures.values()) if failures else str(error)
        first_line = next(iter(text.splitlines()), "")
        what = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        self.record_failure(f"rank {rank}: {what}", is_refusal=isinstance(error, ValueError))

    def record_failure(
        self, reason: str, is_first_cause: bool = False, is_refusal: bool = False
    ) -> None:
        """Set the status to failed, at the iteration it has.

        When one rank fails the others fail for want of it. So a failure that is already recorded
        keeps its reason, unless ``is_first_cause``, or that reason is the loss of a peer and this
        one is not. A refusal (``is_refusal``) changes nothing about a completed run. For any
        process.

        Raises:
            OSError: when the directory cannot be written.
        """
        known = read_status(self.path)
        if known is not None and known.state == "completed" and is_refusal:
            return
        if known is not None and known.state == "failed" and not is_first_cause:
            who = known.reason.partition(":")[0]  # "rank 1", whose own word is better than others'
            is_consequence = CONSEQUENCE.search(known.reason) and not reason.startswith(f"{who} ")
            if not is_consequence or CONSEQUENCE.search(reason):
                return
        iteration, run_id = (known.iteration, known.mlflow_run_id) if known else (0, None)
        write_status(self.path, "failed", iteration, reason, run_id)


def _prove_writable(folder: Path) -> None:
    # Ranks on several nodes may have one process id and make their probes at the same time.
    probe = folder / f".write_probe_{uuid4().hex}"
    try:
        probe.write_bytes(b"probe")  # a quota may take an empty file
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _prove_replaceable(path: Path) -> None:
    """What stands in a file's place must be one, which can be written.

    A link would be replaced by a file, or lead to somebody's. Asked without opening it: closing the
    lock's file again would give the lock back.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        what = "it is a link" if path.is_symlink() else "it is no file"
        raise OSError(errno.EEXIST, f"{what}; move it away", str(path))
    if not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _what(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)
