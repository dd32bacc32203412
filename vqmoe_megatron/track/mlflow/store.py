"""Reaching an MLflow store safely: its default place, creation under a lock, the run to write to.

Everything here may take seconds or raise; only :mod:`mlflow_tracker`'s background thread and
commands call it. ``mlflow`` is imported on first use (about 2 s).
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vqmoe_megatron.rundir.file_lock import LockHeld, LockWait, wait_for_lock
from vqmoe_megatron.track.mlflow.errors import first_line, is_permanent
from vqmoe_megatron.track.mlflow.sqlite_uri import sqlite_path, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

# A slow server costs a shipping attempt at most 2 x 5 s; a user's own value wins.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
RUN_KEY_TAG = "vqmoe.run_key"
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own name
Outcome = Literal["FINISHED", "FAILED", "KILLED"]  # how a run ended, in MLflow's words
# What a run's state in status.json is called in MLflow: a preempted run was killed, and may resume.
OUTCOME_OF_STATE: dict[str, Outcome] = {
    "completed": "FINISHED",
    "failed": "FAILED",
    "requeue": "KILLED",
}


@dataclass
class RunHandle:
    """An open MLflow run and what it already held when it was opened."""

    client: MlflowClient
    run_id: str
    is_new: bool = True
    status: str = "RUNNING"
    known_params: dict[str, str] = field(default_factory=dict)
    known_tags: dict[str, str] = field(default_factory=dict)
    last_steps: dict[str, int] = field(default_factory=dict)  # metric name -> last logged step
    notice: str = ""


@dataclass(frozen=True)
class RunRequest:
    """Which run to open, and what it is called and tagged with when it has to be made."""

    experiment: str
    run_name: str
    run_dir: Path
    run_key: str  # of mlflow.json
    known_run_id: str | None = None  # the run to go on with
    parent_run_id: str | None = None
    start_time_ms: int | None = None  # None: now

    @property
    def tags(self) -> dict[str, str]:
        """Tags of a new run."""
        tags = {"run_dir": str(self.run_dir), RUN_KEY_TAG: self.run_key}
        return tags | ({PARENT_TAG: self.parent_run_id} if self.parent_run_id else {})


def default_mlflow_uri(run_dir: str | Path) -> str:
    """Return the URI used when none is configured: ``mlflow.db`` beside the run directories."""
    return sqlite_uri(Path(run_dir).resolve().parent / "mlflow.db")


@contextmanager
def _creation_lock(uri: str, wait: LockWait | None) -> Iterator[None]:
    """Serialise the first use of a SQLite file: concurrent table creation fails in MLflow.

    Where the file system has no locks, the database is opened without one, and that is said.
    """
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("a+", encoding="utf-8") as lock:
        try:
            wait_for_lock(lock, wait=wait)
        except LockHeld:
            raise
        except OSError as error:
            print(f"mlflow: {lock.name} cannot be locked ({error}); start one run first, alone")
        yield


def connect(uri: str, wait: LockWait | None = None) -> MlflowClient:
    """Return a client of the store, creating a SQLite database when it is missing.

    Safe when several processes start at once; ``wait`` is for their lock. Raises MLflow's or the
    operating system's errors, :class:`LockHeld` among them.
    """
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # One notice per outage is the tracker's; each retry of each request would be another.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # tracebacks: we report
    _check_database(uri)
    with _creation_lock(uri, wait):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _check_database(uri: str) -> None:
    """Refuse a SQLite file that cannot be used, for which MLflow would try 100 s long.

    Among them one that SQLAlchemy takes for another: before 2.1 it decodes no %3F.
    """
    import sqlalchemy

    database = sqlite_path(uri)
    if database is None:
        return
    if database.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(database))
    if database.exists() and not os.access(database, os.R_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(database))
    if Path(sqlalchemy.make_url(uri).database or "") == database:
        return
    raise ValueError(
        f"SQLAlchemy {sqlalchemy.__version__} cannot be told of the file {database}; upgrade it to "
        "2.1, or choose a folder without %, ? and # in its path"
    )


def open_experiment(
    uri: str, experiment: str, wait: LockWait | None = None
) -> tuple[MlflowClient, str]:
    """Connect, creating the experiment when it is missing; return (client, experiment id).

    Safe when several processes start at once. A SQLite store keeps its artifacts in ``mlartifacts``
    beside the file; a server decides for itself. Raises MLflow's or the operating system's errors.
    """
    client = connect(uri, wait)
    from mlflow.exceptions import MlflowException

    database, artifacts = sqlite_path(uri), None
    if database is not None:
        artifacts = (database.resolve().parent / "mlartifacts").as_uri()
    with _creation_lock(uri, wait):
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            return client, found.experiment_id
        try:
            return client, client.create_experiment(experiment, artifact_location=artifacts)
        except MlflowException:
            found = client.get_experiment_by_name(experiment)  # another process was first
            if found is None:
                raise
            return client, found.experiment_id


def open_run(
    uri: str, request: RunRequest, goes_on: bool = True, wait: LockWait | None = None
) -> RunHandle:
    """Open the run to write to: the known one, one made earlier for this run key, or a new one.

    A ``known_run_id`` that the store does not have, or has deleted, gives a new run tagged
    ``resumed_from_unknown_run`` with that id. ``goes_on`` sets the run RUNNING again.
    Raises MLflow's or the operating system's errors.
    """
    client, experiment_id = open_experiment(uri, request.experiment, wait)
    from mlflow.exceptions import MlflowException

    known_id, tags, notice = request.known_run_id, request.tags, ""
    if known_id is not None:
        try:
            return _go_on(client, known_id, goes_on)
        except MlflowException as error:
            if not is_permanent(error):
                raise
            tags["resumed_from_unknown_run"] = known_id
            notice = f"run {known_id} cannot be resumed ({first_line(error)})"
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{request.run_key}'")
    if found:
        return _go_on(client, found[0].info.run_id, goes_on)
    run = client.create_run(
        experiment_id, start_time=request.start_time_ms, run_name=request.run_name, tags=tags
    )
    if notice:
        notice += f"; started {run.info.run_id}, tagged with the old id"
    return RunHandle(client, run.info.run_id, known_tags=tags, notice=notice)


def _go_on(client: MlflowClient, run_id: str, goes_on: bool) -> RunHandle:
    if goes_on:
        client.update_run(run_id, status="RUNNING")
    run = client.get_run(run_id)
    if run.info.lifecycle_stage != "active":
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

        raise MlflowException("it was deleted", error_code=INVALID_PARAMETER_VALUE)
    last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    return RunHandle(
        client,
        run_id,
        is_new=False,
        status=run.info.status,
        known_params=dict(run.data.params),
        known_tags=dict(run.data.tags),
        last_steps=last_steps,
    )
