"""The MLflow run that a study's runs are shown under; a study without MLflow has none."""

from __future__ import annotations

import json
from collections.abc import Callable

from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.study.planned_run import PlannedRun
from vqmoe_megatron.study.study import Study
from vqmoe_megatron.study.study_folder import StudyFolder
from vqmoe_megatron.track.mlflow.errors import MlflowUnavailable
from vqmoe_megatron.track.mlflow.parent_run import end_parent_run, open_parent_run
from vqmoe_megatron.track.mlflow.store import Outcome


def open_study_parent(study: Study, say: Callable[[str], None]) -> None:
    """Create the MLflow store and the parent run, or find it again, and note its id.

    One process does this before runs start, so that they never create a database together. A store
    that cannot be reached is reported and the study goes on: its runs have the parent that was
    noted for this store before, or none.
    """
    tracking = next(iter(study.runs.values())).config.tracking
    if not tracking.mlflow:
        return
    uri, experiment = tracking.mlflow_uri, tracking.experiment
    tags = {"vqmoe.study": study.file.name, "vqmoe.study_dir": str(study.folder.path.resolve())}
    try:
        run_id = open_parent_run(uri, experiment, study.file.name, tags)
    except MlflowUnavailable as error:
        known = _known_parent(study.folder)
        if known is not None and known["uri"] == uri:
            say(f"the MLflow parent run {known['run_id']} stays as it was: {error}")
        else:
            say(f"no MLflow parent run, the study goes on without: {error}")
        return
    known = {"uri": uri, "experiment": experiment, "run_id": run_id}
    replace_file(study.folder.mlflow_parent, json.dumps(known, indent=1) + "\n")
    say(f"mlflow: {uri} parent run {run_id}")


def end_study_parent(folder: StudyFolder, outcome: Outcome, say: Callable[[str], None]) -> None:
    """Set the parent run's final status; a store that cannot be reached is reported."""
    known = _known_parent(folder)
    if known is None:
        return
    try:
        end_parent_run(known["uri"], known["run_id"], outcome)
    except MlflowUnavailable as error:
        say(f"the MLflow parent run may still show as RUNNING: {error}")


def parent_override(folder: StudyFolder, uri: str | None) -> list[str]:
    """Return the override that puts a run under the parent; none without a parent.

    ``uri``: of the run's store. A parent in another one, where the study was shown before, is none.
    """
    known = _known_parent(folder)
    if known is None or known["uri"] != uri:
        return []
    return [f"tracking.parent_run_id={known['run_id']}"]


def point_tags(run: PlannedRun) -> list[str]:
    """Return the override that tags a run with its point: ``point/arm=vq``, an axis a tag."""
    tags = [*run.config.tracking.tags, *(f"point/{axis}={run.point[axis]}" for axis in run.point)]
    return [f"tracking.tags={json.dumps(tags)}"]


def _known_parent(folder: StudyFolder) -> dict[str, str] | None:
    try:
        known = json.loads(folder.mlflow_parent.read_text(encoding="utf-8"))
        return {name: str(known[name]) for name in ("uri", "run_id")}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder.mlflow_parent} is damaged ({error}); remove it to have it made again"
        ) from error
