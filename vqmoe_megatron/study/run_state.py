"""What a run of a study is doing, from its directory and from Slurm's queue."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.rundir.file_lock import is_held
from vqmoe_megatron.rundir.file_names import LOCK_FILE, METRICS_FILE
from vqmoe_megatron.rundir.status import read_status
from vqmoe_megatron.study.planned_run import PlannedRun

# Read from the end of metrics.jsonl: a status table must not read whole logs of long runs.
TAIL_BYTES = 1 << 16
SHOWN_METRICS = ("loss", "val/loss", "tokens_per_second")
STATES = (
    "finished",  # its last iteration is trained and saved
    "running",
    "queued",  # in Slurm's queue
    "stopped",  # saved before its end; goes on when started again
    "failed",
    "lost",  # says running, but nobody holds its directory: killed hard, or its node died
    "waiting",  # never started
)


@dataclass(frozen=True)
class RunState:
    """``metrics``: the last logged value of SHOWN_METRICS, as far as there is one."""

    state: str
    iteration: int
    train_iters: int
    reason: str
    metrics: Mapping[str, float]
    slurm: str = ""  # "1234_5 RUNNING"

    @property
    def is_finished(self) -> bool:
        """Nothing is left to train."""
        return self.state == "finished"


def run_state(run: PlannedRun, slurm: str = "", is_alive: bool = False) -> RunState:
    """Read the state of one run; see :func:`directory_state`."""
    return directory_state(run.run_dir, run.config.train.train_iters, slurm, is_alive)


def directory_state(
    run_dir: Path, train_iters: int, slurm: str = "", is_alive: bool = False
) -> RunState:
    """Read the state of a run of ``train_iters`` iterations from its directory.

    ``slurm``: its task in the queue, ``ID STATE``, or nothing. ``is_alive``: its process is known
    to run; otherwise the lock of its directory is asked, where status.json says running.
    """
    try:
        status = read_status(run_dir)
    except ValueError as error:
        return RunState("failed", 0, train_iters, str(error), {}, slurm)
    iteration = 0
    metrics: dict[str, float] = {}
    if status is not None:
        iteration, metrics = status.iteration, last_metrics(run_dir / METRICS_FILE)
    reason = status.reason if status is not None else ""
    if status is None:
        state = "waiting"
    elif status.state == "completed" and status.iteration >= train_iters:
        state = "finished"
    elif status.state == "completed":  # and stays so until a next attempt's ranks have started
        state = "running" if is_locked(run_dir) else "stopped"
    elif status.state == "failed":
        state = "failed"
    elif status.state == "requeue":
        state = "stopped"
    else:
        is_alive = is_alive or slurm.endswith(" RUNNING") or is_locked(run_dir)
        state = "running" if is_alive else "lost"
        iteration = max(iteration, int(metrics.get("iteration", 0)))
    if is_alive and state == "waiting":
        state = "running"  # it is starting
    if slurm and state not in ("finished", "running"):
        state = "running" if slurm.endswith(" RUNNING") else "queued"
    return RunState(state, iteration, train_iters, reason, metrics, slurm)


def is_locked(run_dir: Path) -> bool:
    """Tell whether a process trains in ``run_dir``: on this machine, or where locks reach it.

    Where locks cannot be asked for, such as in a directory we may only read, the answer is no: a
    run that was killed there could never be started again otherwise.
    """
    try:
        return is_held(run_dir / LOCK_FILE, fcntl.lockf)
    except OSError:
        return False


def last_metrics(path: Path) -> dict[str, float]:
    """Return ``iteration`` and the latest of SHOWN_METRICS among the last lines of a log.

    Values that JSON cannot hold, and lines still being written, are left out.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            tail = file.read()
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in reversed(tail[: tail.rfind(b"\n") + 1].splitlines()):
        try:
            record = json.loads(line)
        except ValueError:  # the first line of the tail may be cut
            continue
        for name in ("iteration", *SHOWN_METRICS):
            value = record.get(name) if isinstance(record, dict) else None
            if name not in found and isinstance(value, int | float):
                found[name] = value
        if len(found) == 1 + len(SHOWN_METRICS):
            break
    return found
