"""``status.json``: the state a launcher decides on, never on an exit code."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.file_lock import is_held
from vqmoe_megatron.rundir.file_names import LOCK_FILE, STATUS_FILE

# What a rank says when the rank at the other end of a connection is gone.
LOST_PEER = re.compile(
    "DistBackendError|DistNetworkError|DistStoreError|Connection (closed|reset|refused)"
    "|Broken pipe|Timed out waiting|pair closure|No route to host"
)
# That, or what it says of a failure that another rank knows the cause of: never the cause.
CONSEQUENCE = re.compile(f"{LOST_PEER.pattern}|another rank could not write its part")
STATES = ("running", "completed", "requeue", "failed")


@dataclass(frozen=True)
class RunStatus:
    """``state``: running | completed | requeue | failed; ``iteration``: the last that counts;
    ``slurm_job``: that of the process which wrote it, as launchers/slurm_world.sh names it."""

    state: str
    iteration: int
    reason: str
    mlflow_run_id: str | None = None
    slurm_job: str | None = None

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise ValueError(f"run state {self.state!r} is not one of {', '.join(STATES)}")
        if not isinstance(self.iteration, int) or self.iteration < 0:
            raise ValueError(f"status iteration={self.iteration!r} must be an integer >= 0")


def write_status(
    run_dir: str | Path, state: str, iteration: int, reason: str, mlflow_run_id: str | None = None
) -> None:
    """Replace ``<run_dir>/status.json`` atomically; ``ValueError`` for an illegal field.

    For rank 0, and for any rank that fails: of several writers the last wins. ``OSError`` when the
    directory cannot be written.
    """
    status = RunStatus(state, iteration, reason, mlflow_run_id, _slurm_job())
    path = Path(run_dir) / STATUS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(asdict(status), indent=2) + "\n")


def _slurm_job() -> str | None:
    """``40_3`` for an array task, whose own number says nothing to a user; None outside Slurm."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def read_status(run_dir: str | Path) -> RunStatus | None:
    """Return the status of a run directory, ``None`` when none was ever written.

    ``ValueError`` when the file exists but cannot be read or is not a status.
    """
    path = Path(run_dir) / STATUS_FILE
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return RunStatus(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a run status ({error}); move it away to go on") from error


def is_alive(run_dir: str | Path) -> bool:
    """Tell whether a process is running in the directory now, whatever its status says.

    A run that was killed leaves the state ``running`` behind, but no lock. Do not call it from the
    process that holds the lock. Where locks cannot be read, the state is believed.
    """
    try:
        return is_held(Path(run_dir) / LOCK_FILE, fcntl.lockf)
    except OSError:
        status = read_status(run_dir)
        return status is not None and status.state == "running"
