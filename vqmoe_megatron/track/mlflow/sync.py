"""Replaying a run directory into MLflow: what the store lacks is sent, nothing is sent twice.

What is there is asked of the store, point by point, and not remembered in the directory: a process
killed between sending and noting would have noted too little, one killed between noting and sending
too much. So it may be run at any time and any number of times. A point is there when the store has
any value for its metric and iteration; where that value is another one (an iteration that was
trained twice), the first stays and is counted as differing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.config import TrackingConfig
from vqmoe_megatron.config.recipe import flatten_config, load_saved_recipe
from vqmoe_megatron.rundir.file_names import CONFIG_FILE, METRICS_FILE, SYSTEM_METRICS_FILE
from vqmoe_megatron.rundir.status import is_alive, read_status
from vqmoe_megatron.rundir.waiting import told_while_waiting
from vqmoe_megatron.track.metrics_log import read_metrics
from vqmoe_megatron.track.mlflow.errors import MlflowUnavailable, explained
from vqmoe_megatron.track.mlflow.record import open_record
from vqmoe_megatron.track.mlflow.run_params import (
    MAX_PARAM_CHARACTERS,
    MAX_TAG_CHARACTERS,
    shortened,
)
from vqmoe_megatron.track.mlflow.store import (
    OUTCOME_OF_STATE,
    Outcome,
    RunHandle,
    RunRequest,
    default_mlflow_uri,
    open_run,
)
from vqmoe_megatron.track.mlflow.writer import (
    NOT_METRICS,
    metric_batches,
    send_metrics,
    send_params,
    send_tags,
    stored_value,
)

History = dict[tuple[str, int], list[float]]  # (metric name, iteration) -> the store's values


@dataclass(frozen=True)
class SyncResult:
    """What one run directory had, what the store had of it, and what was sent."""

    run_dir: Path
    uri: str
    run_id: str | None
    num_points: int = 0  # values in the two logs: metrics x logged iterations
    num_there: int = 0  # of them, in the store before
    num_sent: int = 0
    num_differing: int = 0  # there with another value
    num_only_there: int = 0  # in the store, no longer in metrics.jsonl
    num_params_sent: int = 0
    num_tags_sent: int = 0
    num_files_sent: int = 0
    status: str = ""  # of the MLflow run, afterwards
    is_running: bool = False  # a process is training here: it ships by itself, nothing was done


def check_run_directory(run_dir: Path) -> None:
    """Raise ``ValueError`` when ``run_dir`` is no run directory; reads nothing else."""
    if not (run_dir / CONFIG_FILE).is_file():
        what = f"holds no {CONFIG_FILE}" if run_dir.exists() else "does not exist"
        what = "is a file" if run_dir.is_file() else what
        raise ValueError(
            f"{run_dir} is no run directory: it {what}; give train.output_dir of a run"
        )


def sync_run(run_dir: Path, uri: str | None, report: Callable[[str], None] = print) -> SyncResult:
    """Send what the MLflow run of ``run_dir`` lacks: points, params, tags, files, final status.

    Creates the run where there is none. Waits for the store; no communication between ranks.

    Args:
        run_dir: of a run that is not running now; a running one is left alone.
        uri: of the store; None means the run's own: ``tracking.mlflow_uri`` or the default.
        report: receives notices.

    Raises:
        ValueError: no run directory, or a damaged file in it.
        MlflowUnavailable: the store cannot be reached or refuses; one line that says why.
    """
    check_run_directory(run_dir)
    config = load_saved_recipe(run_dir / CONFIG_FILE)
    tracking = config.tracking
    uri = uri or tracking.mlflow_uri or default_mlflow_uri(run_dir)
    record = open_record(run_dir, report)
    known = read_status(run_dir)
    if is_alive(run_dir):
        return SyncResult(run_dir, uri, record.known_run(uri), is_running=True)
    records = read_metrics(run_dir) if (run_dir / METRICS_FILE).exists() else []
    has_system = (run_dir / SYSTEM_METRICS_FILE).exists()
    system_records = read_metrics(run_dir / SYSTEM_METRICS_FILE) if has_system else []
    path = run_dir / (METRICS_FILE if records else CONFIG_FILE)
    changed_ms = path.stat().st_mtime_ns // 1_000_000
    status_id = known.mlflow_run_id if known and uri == _own_uri(tracking, run_dir) else None
    request = RunRequest(
        tracking.experiment,
        tracking.run_name or run_dir.resolve().name,
        run_dir.resolve(),
        record.run_key,
        record.known_run(uri) or status_id,
        tracking.parent_run_id,
        int(records[0].get("timestamp_ms", changed_ms)) if records else changed_ms,
    )
    params = shortened(flatten_config(config), MAX_PARAM_CHARACTERS, report)
    tags = shortened(record.tags, MAX_TAG_CHARACTERS, report)
    try:
        with told_while_waiting(f"MLflow at {uri} is at work for {run_dir}"):
            handle = open_run(uri, request, goes_on=False)
            record.note_run(uri, handle.run_id)
            if handle.notice:
                report(f"{run_dir}: {handle.notice}")
            history = _history(handle)
            points = _points(records + system_records)
            batches = metric_batches(
                records + system_records, lambda name, step: (name, step) in history, changed_ms
            )
            for batch in batches:
                send_metrics(handle, batch)
            num_params = send_params(handle, params)
            num_tags = send_tags(handle, tags)
            num_files = _send_files(handle, run_dir)
            outcome: Outcome = OUTCOME_OF_STATE.get(known.state, "KILLED") if known else "KILLED"
            if handle.status != outcome:
                handle.client.set_terminated(handle.run_id, outcome, end_time=_last_ms(records))
    except Exception as error:
        raise MlflowUnavailable(f"MLflow at {uri}: {explained(error, uri)}") from error
    there = points.keys() & history.keys()
    return SyncResult(
        run_dir,
        uri,
        handle.run_id,
        num_points=len(points),
        num_there=len(there),
        num_sent=sum(len(batch) for batch in batches),
        num_differing=sum(not _is_among(points[key], history[key]) for key in there),
        num_only_there=len(history.keys() - points.keys()),
        num_params_sent=num_params,
        num_tags_sent=num_tags,
        num_files_sent=num_files,
        status=outcome,
    )


def _own_uri(tracking: TrackingConfig, run_dir: Path) -> str:
    return tracking.mlflow_uri or default_mlflow_uri(run_dir)


def _points(records: list[dict[str, int | float]]) -> dict[tuple[str, int], float]:
    return {
        (name, int(record["iteration"])): float(value)
        for record in records
        for name, value in record.items()
        if name not in NOT_METRICS
    }


def _history(handle: RunHandle) -> History:
    """Return every point the store has; one request for each metric it has."""
    history: History = {}
    for name in handle.last_steps:
        for metric in handle.client.get_metric_history(handle.run_id, name):
            history.setdefault((name, metric.step), []).append(metric.value)
    return history


def _is_among(value: float, stored: list[float]) -> bool:
    if math.isnan(value):
        return any(math.isnan(other) for other in stored)
    return stored_value(value) in stored


def _send_files(handle: RunHandle, run_dir: Path) -> int:
    """Upload the recipe and the plots that are missing or have another size; return how many."""
    num_sent = 0
    for folder, files in (
        (None, [run_dir / CONFIG_FILE]),
        ("plots", sorted((run_dir / "plots").glob("*.png"))),
    ):
        if not files:
            continue
        there = {
            Path(found.path).name: found.file_size
            for found in handle.client.list_artifacts(handle.run_id, folder)
        }
        for file in files:
            if there.get(file.name, -1) not in (None, file.stat().st_size):
                handle.client.log_artifact(handle.run_id, str(file), folder)
                num_sent += 1
    return num_sent


def _last_ms(records: list[dict[str, int | float]]) -> int | None:
    last = records[-1].get("timestamp_ms") if records else None
    return None if last is None else int(last)
