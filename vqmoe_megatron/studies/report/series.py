"""Runs put together: seeds of one configuration into a cell, cells along the experts into a series.

The axes of a grid that name a series are those that a reader has to tell apart: not the seed, and
not an axis that follows from the number of experts N (N itself, or codes given as a multiple).
Only finished runs are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vqmoe_megatron.studies.report.intervals import SeedMean, seed_means
from vqmoe_megatron.studies.report.run_table import RunRow


@dataclass(frozen=True)
class Series:
    """The runs of one curve; ``rows`` holds unfinished ones too."""

    label: str
    rows: list[RunRow]

    @property
    def cells(self) -> dict[int, list[RunRow]]:
        """Finished runs by number of experts, in ascending order."""
        finished = [row for row in self.rows if row.is_finished]
        sizes = sorted({row.num_moe_experts for row in finished})
        return {size: [row for row in finished if row.num_moe_experts == size] for size in sizes}

    def means(self, values: str) -> dict[int, SeedMean]:
        """Mean over seeds of a figure (see :func:`figure_of`) by number of experts; runs without a
        finite one are left out."""
        found = {
            size: [value for row in rows if (value := figure_of(row, values)) is not None]
            for size, rows in self.cells.items()
        }
        found = {size: values for size, values in found.items() if values}
        return dict(zip(found, seed_means(list(found.values())), strict=True))


def figure_of(row: RunRow, name: str) -> float | None:
    """Return a finite figure of a run: a field of :class:`RunRow`, of its plan as ``plan.NAME``, or
    one of its late metrics; None where there is none."""
    if name in row.late:
        value: Any = row.late[name]
    elif name.startswith("plan."):
        value = getattr(row.planned, name.removeprefix("plan."))
    else:
        value = getattr(row, name, None)
    return float(value) if value is not None and math.isfinite(value) else None


def split_series(rows: Sequence[RunRow]) -> list[Series]:
    """Return the series in the order in which the grid names them.

    Runs whose configuration is not known have no number of experts and belong to none.
    """
    known = [row for row in rows if row.config is not None]
    axes = naming_axes(known)
    labels: dict[str, list[RunRow]] = {}
    for row in known:
        labels.setdefault(label(row, axes), []).append(row)
    return [Series(text, members) for text, members in labels.items()]


def naming_axes(rows: Sequence[RunRow]) -> list[str]:
    """Return the axes that tell series apart; rows must have a configuration."""
    axes = dict.fromkeys(axis for row in rows for axis in row.point)
    return [axis for axis in axes if not is_seed(axis, rows) and not follows_size(axis, rows)]


def label(row: RunRow, axes: Sequence[str]) -> str:
    """Return the name of a run on ``axes``: words as they are, numbers with their axis."""
    named = [(axis, row.point[axis]) for axis in axes if axis in row.point]
    texts = [value if isinstance(value, str) else f"{axis} {value}" for axis, value in named]
    return ", ".join(texts) or "all runs"


def is_seed(axis: str, rows: Sequence[RunRow]) -> bool:
    """Whether ``axis`` is the seed of every run."""
    return all(row.point.get(axis) == row.config.train.seed for row in rows if row.config)


def follows_size(axis: str, rows: Sequence[RunRow]) -> bool:
    """Whether every number of experts has one value of ``axis``."""
    values: dict[int | None, set[str]] = {}
    for row in rows:
        if row.point.get(axis) is not None:
            values.setdefault(row.num_moe_experts, set()).add(str(row.point[axis]))
    return all(len(found) <= 1 for found in values.values())


@dataclass(frozen=True)
class Curve:
    """The mean validation loss of one cell during training, at evaluations all its seeds have."""

    num_moe_experts: int
    num_tokens: list[int]
    means: list[SeedMean]
    flops_per_token: float | None


def mean_curves(series: Series) -> list[Curve]:
    """Return one curve per number of experts, over finished runs.

    The spread over seeds is pooled over the numbers of experts evaluated at the same tokens.
    """
    losses = {size: [_val_losses(row) for row in rows] for size, rows in series.cells.items()}
    common = {
        size: set.intersection(*(set(found) for found in seeds)) for size, seeds in losses.items()
    }
    at: dict[int, dict[int, SeedMean]] = {size: {} for size in losses}
    for tokens in sorted(set().union(*common.values())):
        sizes = [size for size in losses if tokens in common[size]]
        groups = [[seed[tokens] for seed in losses[size]] for size in sizes]
        for size, mean in zip(sizes, seed_means(groups), strict=True):
            at[size][tokens] = mean
    return [
        Curve(
            size,
            list(points),
            list(points.values()),
            series.cells[size][0].planned.flops_per_token,
        )
        for size, points in at.items()
        if points
    ]


def unfinished_curves(series: Series) -> list[tuple[RunRow, list[int], list[float]]]:
    """Return runs that have not finished, each with its tokens and losses so far."""
    found = []
    for row in series.rows:
        losses = _val_losses(row)
        if not row.is_finished and losses:
            found.append((row, list(losses), list(losses.values())))
    return found


def _val_losses(row: RunRow) -> dict[int, float]:
    """Tokens -> validation loss, of evaluations after the start with a finite loss."""
    return {
        int(record["consumed_tokens"]): float(record["val/loss"])
        for record in row.records
        if math.isfinite(record.get("val/loss", math.nan)) and record.get("consumed_tokens", 0) > 0
    }
