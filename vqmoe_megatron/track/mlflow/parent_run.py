"""The MLflow run under which the runs of a study are shown.

The command that submits a study opens it, keeps its id and hands it to every run as
``tracking.parent_run_id``. These functions talk to the store at once, in the calling thread, with
the client's short timeouts; they are for commands, not for training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from vqmoe_megatron.rundir.waiting import told_while_waiting
from vqmoe_megatron.runtime.optional_packages import missing
from vqmoe_megatron.track.mlflow.errors import MlflowUnavailable, explained
from vqmoe_megatron.track.mlflow.run_params import MAX_TAG_CHARACTERS, shortened
from vqmoe_megatron.track.mlflow.store import Outcome, connect, open_experiment

IDENTITY_TAG = "vqmoe.parent_identity"  # name and tags the run was opened with, hashed
_Result = TypeVar("_Result")


def open_parent_run(uri: str | None, experiment: str, name: str, tags: Mapping[str, object]) -> str:
    """Return the id of the parent run ``name``: the one that has all of ``tags``, or a new one.

    So a command that was killed before it noted the id finds the same run again; give a tag that
    belongs to one study only, such as its directory. Without tags every call makes a new run.
    The run is RUNNING afterwards; :func:`end_parent_run` says how it ended.

    Args:
        uri: of the runs' own store: ``tracking.mlflow_uri``, else
            :func:`~vqmoe_megatron.track.mlflow.store.default_mlflow_uri` of one of their
            directories. ``None`` is refused, because the default depends on that directory.

    Raises:
        ValueError: ``uri`` is None.
        MlflowUnavailable: the store cannot be reached or refuses; one line that says why.
    """
    texts = shortened(tags, MAX_TAG_CHARACTERS, print)
    # One word to search by: MLflow's search has no way to quote every value.
    identity = hashlib.sha256(json.dumps([name, sorted(texts.items())]).encode()).hexdigest()

    def open_run(uri: str) -> str:
        client, experiment_id = open_experiment(uri, experiment)
        if texts:
            found = client.search_runs([experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'")
            if found:
                client.update_run(found[0].info.run_id, status="RUNNING")
                return found[0].info.run_id
        tags = {**texts, IDENTITY_TAG: identity}
        return client.create_run(experiment_id, run_name=name, tags=tags).info.run_id

    return _at(uri, open_run)


def log_parent_artifacts(uri: str | None, run_id: str, folder: Path) -> None:
    """Upload the files in and below ``folder`` as artifacts of the parent run, replacing old ones.

    Raises:
        ValueError: ``uri`` is None, or ``folder`` is no directory.
        MlflowUnavailable: as :func:`open_parent_run`.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no directory; nothing to upload to MLflow run {run_id}")
    _at(uri, lambda address: connect(address).log_artifacts(run_id, str(folder)))


def end_parent_run(uri: str | None, run_id: str, status: Outcome) -> None:
    """Set the parent run's final status: FINISHED, FAILED or KILLED. Raises as the others."""
    _at(uri, lambda address: connect(address).set_terminated(run_id, status))


def _at(uri: str | None, action: Callable[[str], _Result]) -> _Result:
    if uri is None:
        raise ValueError(
            "the parent run needs a URI: tracking.mlflow_uri, or default_mlflow_uri(run_dir) of "
            "one of the study's run directories"
        )
    problem = missing("mlflow")
    if problem is not None:
        raise MlflowUnavailable(problem)
    try:
        with told_while_waiting(f"waiting for MLflow at {uri}"):
            return action(uri)
    except Exception as error:
        raise MlflowUnavailable(f"MLflow at {uri}: {explained(error, uri)}") from error
