"""One row per run of a study, from its directory: what was asked, what was measured, its state.

    <study>/study.yaml      the study; name and rule go to the page's head
    <study>/recipe.yaml     what the runs start from
    <study>/runs.json       every run of the grid, started or not
    <study>/runs/<name>/    run_config.yaml, metrics.jsonl, status.json

A run without files is a row too. A file that cannot be read makes the row ``unreadable`` with the
reason; nothing is dropped. All figures are those of ``metrics.jsonl``, unrounded.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_recipe, load_saved_recipe
from vqmoe_megatron.rundir.file_names import CONFIG_FILE, METRICS_FILE
from vqmoe_megatron.study.baselines import read_baselines
from vqmoe_megatron.study.report.planned import Planned, planned_quantities
from vqmoe_megatron.study.run_state import directory_state
from vqmoe_megatron.study.study_file import study_section
from vqmoe_megatron.study.study_folder import StudyFolder
from vqmoe_megatron.track.metrics_log import read_metrics

WARM_UP_SHARE = 0.1  # of the logged windows, at least one, left out of the median throughput
LATE_SHARE = 0.25  # of the logged windows, at least one, over which routing is averaged
LATE_METRICS = ("moe/expert_load_imbalance", "vq/code_perplexity", "vq/dead_codes")

Records = list[dict[str, int | float]]


@dataclass
class RunRow:
    """One run. ``state``: one of run_state.STATES, or unreadable. None: not known."""

    name: str
    point: dict[str, Any]
    num_ranks: int
    state: str = "waiting"
    reason: str = ""
    config: RunConfig | None = None
    records: Records = field(default_factory=list)
    planned: Planned = field(default_factory=Planned)
    iteration: int | None = None
    final_val_loss: float | None = None  # of the last evaluation, nats per token
    best_val_loss: float | None = None
    final_bits_per_byte: float | None = None
    num_tokens: int | None = None
    tokens_per_second: float | None = None  # median without warm-up
    late: dict[str, float] = field(default_factory=dict)  # LATE_METRICS

    @property
    def is_finished(self) -> bool:
        """Whether the run did all its iterations."""
        return self.state == "finished"

    @property
    def num_flops(self) -> float | None:
        """Operations of the whole run on all ranks: tokens times the planned ones per token."""
        per_token = self.planned.flops_per_token
        return None if per_token is None or self.num_tokens is None else per_token * self.num_tokens

    @property
    def num_moe_experts(self) -> int | None:
        """N, once the run's configuration is known."""
        return None if self.config is None else self.config.model.num_moe_experts


@dataclass(frozen=True)
class ReportedStudy:
    """A study's directory as far as it has come."""

    path: Path
    name: str
    rule: str
    hardware: str  # profile of the predictions
    rows: list[RunRow]
    baselines: tuple[str, ...] = ()  # study.baseline; none: see baselines.py

    @property
    def finished(self) -> list[RunRow]:
        """Runs that did all their iterations."""
        return [row for row in self.rows if row.is_finished]


def read_study(path: Path, hardware: str) -> ReportedStudy:
    """Read a study from its directory or its YAML file. No communication.

    ``hardware``: the profile that predictions are made with.

    Raises:
        ValueError: when there is no such study, or it has no runs yet.
    """
    directory = _study_directory(Path(path))
    folder = StudyFolder(directory)
    if not folder.runs_file.is_file():
        raise ValueError(
            f"{directory} holds no {folder.runs_file.name}: the study has no runs yet; start it "
            "with `vqmoe study run` or `vqmoe study submit`"
        )
    settings = study_section(folder.study_copy) if folder.study_copy.is_file() else {}
    entries = _entries(folder.runs_file)
    rows = [_read_run(folder, settings, entry, hardware) for entry in entries]
    name = str(settings.get("name") or directory.name)
    rule = str(settings.get("rule") or "not stated")
    # What a report compares changes no run, so the file that is asked for has the word.
    asked = study_section(Path(path)) if Path(path).is_file() else settings
    return ReportedStudy(
        directory, name, rule, hardware, rows, read_baselines(asked.get("baseline"))
    )


def _study_directory(path: Path) -> Path:
    if path.is_dir():
        return path
    if not path.exists():
        raise ValueError(f"{path} is neither a study's YAML file nor its directory: no such path")
    output_dir = study_section(path).get("output_dir")
    if not isinstance(output_dir, str) or not output_dir.strip():
        found = "is missing" if output_dir is None else f"must be a path, not {output_dir!r}"
        raise ValueError(f"{path} does not say where its runs are: study.output_dir {found}")
    if not Path(output_dir).is_dir():
        raise ValueError(
            f"{path}: study.output_dir={output_dir} does not exist: the study has no runs yet; "
            "start it with `vqmoe study run` or `vqmoe study submit`"
        )
    return Path(output_dir)


def _entries(listing: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(listing.read_text(encoding="utf-8"))
        whole = [
            {
                "name": str(entry["name"]),
                "run_dir": str(entry["run_dir"]),
                "point": dict(entry["point"]),
                "overrides": list(entry["overrides"]),
                "num_ranks": int(entry["num_ranks"]),
            }
            for entry in entries
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{listing} is not a list of runs with name, run_dir, point, overrides and num_ranks: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not whole:
        raise ValueError(f"{listing} lists no runs")
    return whole


def _read_run(
    folder: StudyFolder, settings: dict[str, Any], entry: dict[str, Any], hardware: str
) -> RunRow:
    """Read one run; the directory beside runs.json goes first, so that a moved study is whole."""
    row = RunRow(entry["name"], entry["point"], entry["num_ranks"])
    run_dir = folder.path / "runs" / row.name
    run_dir = run_dir if run_dir.is_dir() else Path(entry["run_dir"])
    try:
        row.config = _config(folder, run_dir, settings, entry["overrides"])
        if row.config is None:
            row.reason = "it has not started, and its recipe is not there to plan it"
        else:
            row.planned = planned_quantities(row.config, row.num_ranks, hardware)
            state = directory_state(run_dir, row.config.train.train_iters)
            row.state, row.reason, row.iteration = state.state, state.reason, state.iteration
        if (run_dir / METRICS_FILE).is_file():
            row.records = read_metrics(run_dir)
            _measure(row)
    except (ValueError, OSError) as error:
        row.state, row.reason = "unreadable", str(error).splitlines()[0]
    return row


def _config(
    folder: StudyFolder, run_dir: Path, settings: dict[str, Any], overrides: list[str]
) -> RunConfig | None:
    """Return the run's own configuration, or the one it will have; None where the recipe is gone
    and the run has not started. The copy beside runs.json goes first: the study may have moved."""
    if (run_dir / CONFIG_FILE).is_file():
        return load_saved_recipe(run_dir / CONFIG_FILE)
    for recipe in (folder.recipe_copy, Path(str(settings.get("recipe", "")))):
        if recipe.is_file():
            return load_recipe(recipe, overrides)
    return None


def _measure(row: RunRow) -> None:
    """Fill what ``metrics.jsonl`` says."""
    last = row.records[-1] if row.records else {}
    row.iteration = max(row.iteration or 0, int(last.get("iteration", 0)))
    row.num_tokens = int(last["consumed_tokens"]) if "consumed_tokens" in last else None
    losses = _values(row.records, "val/loss")
    if losses:
        row.final_val_loss = losses[-1]
        finite = [loss for loss in losses if math.isfinite(loss)]
        row.best_val_loss = min(finite) if finite else None
        row.final_bits_per_byte = (_values(row.records, "val/bits_per_byte") or [None])[-1]
    speeds = _values(row.records, "tokens_per_second")
    warm_up = max(1, math.ceil(WARM_UP_SHARE * len(speeds)))
    row.tokens_per_second = statistics.median(speeds[warm_up:]) if speeds[warm_up:] else None
    for metric in LATE_METRICS:
        values = _values(row.records, metric)
        late = values[-max(1, math.ceil(LATE_SHARE * len(values))) :]
        if late:
            row.late[metric] = statistics.fmean(late)


def _values(records: Records, name: str) -> list[float]:
    return [record[name] for record in records if name in record]


# What runs.csv says of a run, behind the first two the grid's axes; None: not known.
COLUMNS: dict[str, Callable[[RunRow], Any]] = {
    "name": lambda row: row.name,
    "state": lambda row: row.state,
    "num_ranks": lambda row: row.num_ranks,
    "iteration": lambda row: row.iteration,
    "num_parameters_total": lambda row: row.planned.num_parameters_total,
    "num_parameters_active": lambda row: row.planned.num_parameters_active,
    "num_tokens": lambda row: row.num_tokens,
    "num_flops": lambda row: row.num_flops,
    "final_val_loss": lambda row: row.final_val_loss,
    "best_val_loss": lambda row: row.best_val_loss,
    "final_bits_per_byte": lambda row: row.final_bits_per_byte,
    "tokens_per_second": lambda row: row.tokens_per_second,
    "wire_bytes_per_rank_and_step": lambda row: row.planned.wire_bytes_per_step,
    **{
        metric.partition("/")[2]: lambda row, metric=metric: row.late.get(metric)
        for metric in LATE_METRICS
    },
    "reason": lambda row: row.reason or row.planned.reason,
}


def csv_text(study: ReportedStudy) -> str:
    """Return the table as CSV: numbers at full precision, an empty field for what is not known."""
    axes = list(dict.fromkeys(axis for row in study.rows for axis in row.point))
    names = list(COLUMNS)
    lines = [[*names[:2], *axes, *names[2:]]]
    for row in study.rows:
        cells = [column(row) for column in COLUMNS.values()]
        lines.append([*cells[:2], *(row.point.get(axis) for axis in axes), *cells[2:]])
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows(["" if cell is None else cell for cell in line] for line in lines)
    return stream.getvalue()
