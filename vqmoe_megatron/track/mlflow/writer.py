"""Writing to an open MLflow run within its limits; used by the shipping thread and by the sync.

Every function talks to the store in the calling thread and raises what it raises.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from vqmoe_megatron.metrics.metric import is_mlflow_name
from vqmoe_megatron.track.mlflow.store import RunHandle

if TYPE_CHECKING:
    from mlflow.entities import Metric

MAX_ITEMS_PER_REQUEST = 100  # MLflow's limit for params and tags in one batch
MAX_METRICS_PER_REQUEST = 1000  # MLflow's limit for one batch
NOT_METRICS = ("iteration", "timestamp_ms")  # step and time of every point of a record


def metric_batches(
    records: Iterable[Mapping[str, int | float]],
    is_there: Callable[[str, int], bool],
    default_timestamp_ms: int,
) -> list[list[Metric]]:
    """Return the points of ``records`` that the store lacks, in order, cut to its request size.

    A point's time is its record's, so sending it twice stores it once. Names that MLflow refuses
    are left out; the metric table has none.

    Args:
        records: of ``metrics.jsonl``.
        is_there: tells of (metric name, iteration) whether the store has a value.
        default_timestamp_ms: for records of releases that noted no time.
    """
    from mlflow.entities import Metric

    points = [
        Metric(
            name,
            float(value),
            int(record.get("timestamp_ms", default_timestamp_ms)),
            int(record["iteration"]),
        )
        for record in records
        for name, value in record.items()
        if name not in NOT_METRICS
        and is_mlflow_name(name)
        and not is_there(name, int(record["iteration"]))
    ]
    return list(_parts(points, MAX_METRICS_PER_REQUEST))


def send_metrics(handle: RunHandle, batch: Sequence[Metric]) -> None:
    """Send one batch of :func:`metric_batches`."""
    handle.client.log_batch(handle.run_id, metrics=batch)


def send_params(handle: RunHandle, params: Mapping[str, str]) -> int:
    """Send the params the run lacks and return how many; a changed one becomes ``resume/<key>``.

    MLflow refuses to change a param.
    """
    from mlflow.entities import Param

    known = handle.known_params
    changed = {f"resume/{k}": text for k, text in params.items() if known.get(k, text) != text}
    fresh = [Param(name, text) for name, text in params.items() if name not in known]
    for part in _parts(fresh, MAX_ITEMS_PER_REQUEST):
        handle.client.log_batch(handle.run_id, params=part)
    handle.known_params = {**params, **known}
    send_tags(handle, changed)
    return len(fresh)


def send_tags(handle: RunHandle, tags: Mapping[str, str]) -> int:
    """Set the tags that the run lacks or has otherwise; return how many."""
    from mlflow.entities import RunTag

    fresh = [RunTag(k, text) for k, text in tags.items() if handle.known_tags.get(k) != text]
    for part in _parts(fresh, MAX_ITEMS_PER_REQUEST):
        handle.client.log_batch(handle.run_id, tags=part)
    handle.known_tags = {**handle.known_tags, **tags}
    return len(fresh)


def stored_value(value: float) -> float:
    """Return what a store gives back for ``value``: MLflow keeps infinities as the largest float.

    NaN stays NaN.
    """
    if math.isinf(value):
        return math.copysign(sys.float_info.max, value)
    return float(value)


def _parts(items: Sequence, size: int) -> Iterable:
    return (items[start : start + size] for start in range(0, len(items), size))
