"""Reaching an MLflow store safely: its default place, creation under a lock, the run to write to.

Everything here may take seconds or raise; only :mod:`mlflow_tracker`'s background thread and
commands that submit work call it. ``mlflow`` is imported on first use (about 2 s).
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vqmoe_megatron.tracking.mlflow_errors import first_line, is_permanent

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE_PREFIX = "sqlite:///"
# A slow server costs a shipping attempt at most 2 x 5 s; a user's own value wins.
CLIENT_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
Outcome = Literal["FINISHED", "FAILED", "KILLED"]  # how a run ended, in MLflow's words


@dataclass
class RunHandle:
    """An open MLflow run and what it already held when it was opened."""

    client: MlflowClient
    run_id: str
    resumed: bool = False
    known_params: dict[str, str] = field(default_factory=dict)
    last_steps: dict[str, int] = field(default_factory=dict)  # metric name -> last logged step
    notice: str = ""


def default_mlflow_uri(run_dir: str | Path) -> str:
    """Return the URI used when none is configured: ``mlflow.db`` beside the run directories."""
    return f"{SQLITE_PREFIX}{Path(run_dir).resolve().parent / 'mlflow.db'}"


@contextmanager
def _creation_lock(uri: str) -> Iterator[None]:
    """Serialise the first use of a SQLite file: concurrent table creation fails in MLflow.

    Where the file system has no locks, the database is opened without one, and that is said.
    """
    if not uri.startswith(SQLITE_PREFIX):
        yield
        return
    database = Path(uri.removeprefix(SQLITE_PREFIX))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f"{database.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            print(f"mlflow: {lock.name} cannot be locked ({error}); start one run first, alone")
        yield


def connect(uri: str) -> MlflowClient:
    """Return a client of the store, creating a SQLite database when it is missing.

    Safe when several processes start at once. Raises MLflow's or the operating system's errors.
    """
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    # One notice per outage is the tracker's; each retry of each request would be another.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    for noisy in ("mlflow.store.db.utils", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    with _creation_lock(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


def open_experiment(uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """Connect, creating the experiment when it is missing; return (client, experiment id).

    Safe when several processes start at once. A SQLite store keeps its artifacts in ``mlartifacts``
    beside the file; a server decides for itself. Raises MLflow's or the operating system's errors.
    """
    client = connect(uri)
    from mlflow.exceptions import MlflowException

    artifacts = None
    if uri.startswith(SQLITE_PREFIX):
        folder = Path(uri.removeprefix(SQLITE_PREFIX)).resolve().parent / "mlartifacts"
        artifacts = folder.as_uri()
    with _creation_lock(uri):
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
    uri: str, experiment: str, run_name: str, tags: Mapping[str, str], resume_run_id: str | None
) -> RunHandle:
    """Open the run to write to: the one to resume, or a new one.

    An unknown ``resume_run_id`` gives a new run tagged ``resumed_from_unknown_run`` with that id.
    """
    client, experiment_id = open_experiment(uri, experiment)
    if resume_run_id is None:
        run = client.create_run(experiment_id, run_name=run_name, tags=dict(tags))
        return RunHandle(client, run.info.run_id)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(resume_run_id)
        client.update_run(resume_run_id, status="RUNNING")
    except MlflowException as error:
        if not is_permanent(error):
            raise
        tags = {**tags, "resumed_from_unknown_run": resume_run_id}
        run = client.create_run(experiment_id, run_name=run_name, tags=tags)
        return RunHandle(
            client,
            run.info.run_id,
            notice=f"run {resume_run_id} cannot be resumed ({first_line(error)}); "
            f"started {run.info.run_id}, tagged with the old id",
        )
    last_steps = {metric.key: metric.step for metric in run.data.to_proto().metrics}
    return RunHandle(client, resume_run_id, True, dict(run.data.params), last_steps)
