"""What a run directory holds, as an observation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkout import Checkout

READER = Path(__file__).resolve().with_name("read_run.py")
TIMES = ("tokens_per_second", "step_time_ms", "overhead_share", "timestamp_ms")
NOT_COMPARED = (*TIMES, "memory/peak_rss_bytes")  # but that they are there
TEXTS = ("*.json", "*.yaml", "*.txt", "checkpoints/*/*.json", "checkpoints/*/*.yaml")


def metric_series(metrics: Path, after_iteration: int = 0) -> dict[str, Any]:
    """Return every metric as the list of its values, None where an iteration has it not."""
    records = json_lines(metrics)
    records = [record for record in records if record["iteration"] > after_iteration]
    return {
        f"metric {name}": f"{sum(name in record for record in records)} values"
        if name in NOT_COMPARED
        else [record.get(name) for record in records]
        for name in dict.fromkeys(name for record in records for name in record)
    }


def observe_run(checkout: Checkout, name: str, after_iteration: int = 0) -> dict[str, Any]:
    """Observe ``name``, a run directory in the work folder.

    Files by name; metrics after ``after_iteration``; arrays, checkpoint tensors and texts whole.
    Of ``system_metrics.jsonl`` its name only: a short run may end before the first sample.
    """
    run_dir = checkout.work / name
    found: dict[str, Any] = {"files": file_names(run_dir)}
    found |= metric_series(run_dir / "metrics.jsonl", after_iteration)
    for pattern in TEXTS:
        for file in sorted(run_dir.glob(pattern)):
            found[str(file.relative_to(run_dir))] = checkout.stable(file.read_text())
    read = checkout.run_python(str(READER), name)
    if read.returncode:
        return {**found, "failures": [f"{name} could not be read: {read.stderr[-500:]}"]}
    return {**found, **json.loads(read.stdout)}


def json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the records of a file; none where it is missing, which ``files`` tells."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def file_names(folder: Path) -> list[str]:
    """Return all files below a folder, sorted."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
