"""Runs put together: seeds of one configuration into a cell, cells along the experts into a series.

The axes of a grid that name a series are those that a reader has to tell apart: not the seed, and
not an axis that follows from the number of experts N (N itself, or codes given as a multiple).
Only finished runs are averaged, and losses only over runs whose last one is finite: what diverged
has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vqmoe_megatron.config.recipe import flatten_config
from vqmoe_megatron.study.planned_run import decides_training
from vqmoe_megatron.study.report.intervals import SeedMean, seed_means
from vqmoe_megatron.study.report.run_table import RunRow

FINAL_LOSS = "final_val_loss"
FILLED_IN = "model.vocab_size"  # from the corpus when a run starts


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
    return words_of(row.point, axes) or "all runs"


def words_of(values: Mapping[str, Any], axes: Sequence[str]) -> str:
    """Return the values on ``axes``, as far as there are any: ``vq, experts 4``."""
    named = [(axis, values[axis]) for axis in axes if axis in values]
    return ", ".join(
        value if isinstance(value, str) else f"{axis} {value}" for axis, value in named
    )


def is_seed(axis: str, rows: Sequence[RunRow]) -> bool:
    """Whether ``axis`` stands for the seed: every run has it, its values stand one-to-one for
    ``train.seed``, and runs that differ along it alone differ in no other setting.

    Without two such runs only values that are the seed itself are known to stand for it.
    """
    if not all(axis in row.point for row in rows):
        return False
    pairs = {(str(row.point[axis]), row.config.train.seed) for row in rows}
    if not len(pairs) == len({value for value, _ in pairs}) == len({seed for _, seed in pairs}):
        return False
    alike: dict[tuple[tuple[str, str], ...], list[RunRow]] = {}
    for row in rows:
        rest = tuple((name, str(value)) for name, value in row.point.items() if name != axis)
        alike.setdefault(rest, []).append(row)
    groups = [members for members in alike.values() if len(members) > 1]
    is_known = bool(groups) or all(row.point[axis] == row.config.train.seed for row in rows)
    return is_known and all(_differ_in_seed_alone(members) for members in groups)


def _differ_in_seed_alone(rows: Sequence[RunRow]) -> bool:
    if len({row.num_ranks for row in rows}) > 1:
        return False
    settings = [dict(flatten_config(row.config)) for row in rows]
    for key in settings[0]:
        if key != "train.seed" and decides_training(key):
            values = {repr(one[key]) for one in settings}
            if len(values - {"None"} if key == FILLED_IN else values) > 1:
                return False
    return True


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
    """Return one curve per number of experts, over finished runs whose last loss is finite.

    The spread over seeds is pooled over the numbers of experts evaluated at the same tokens.
    """
    cells = {size: [row for row in rows if has_loss(row)] for size, rows in series.cells.items()}
    cells = {size: rows for size, rows in cells.items() if rows}
    losses = {size: [_val_losses(row) for row in rows] for size, rows in cells.items()}
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
        Curve(size, list(points), list(points.values()), cells[size][0].planned.flops_per_token)
        for size, points in at.items()
        if points
    ]


def single_curves(series: Series) -> list[tuple[RunRow, list[int], list[float]]]:
    """Return runs that enter no mean curve, unfinished or without a finite loss at their end, each
    with its tokens and its finite losses."""
    found = []
    for row in series.rows:
        losses = _val_losses(row)
        if losses and not (row.is_finished and has_loss(row)):
            found.append((row, list(losses), list(losses.values())))
    return found


def has_loss(row: RunRow) -> bool:
    """Whether the last validation loss of a run is there and finite."""
    return figure_of(row, FINAL_LOSS) is not None


def _val_losses(row: RunRow) -> dict[int, float]:
    """Tokens -> validation loss, of evaluations after the start with a finite loss."""
    return {
        int(record["consumed_tokens"]): float(record["val/loss"])
        for record in row.records
        if math.isfinite(record.get("val/loss", math.nan)) and record.get("consumed_tokens", 0) > 0
    }
