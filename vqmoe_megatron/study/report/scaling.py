"""Weak and strong scaling: the same model on different numbers of ranks, measured and predicted.

P ranks, B global batch size, P0 the fewest ranks of a line.

    strong   B is the same everywhere       weak   B / P is the same everywhere
    efficiency(P) = (tokens/s at P / P) / (tokens/s at P0 / P0)

Measured lines come from finished runs that differ in nothing of the sections ``model`` and ``vq``,
nor in any axis of the grid but ranks, seed and global batch: other layouts are other lines.
Predicted ones come from the plan's step time, for the study's own runs and for ``DOUBLINGS`` times
twice as many ranks; more ranks are more data-parallel replicas, everything else stays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.study.report.intervals import SeedMean, seed_means
from vqmoe_megatron.study.report.planned import planned_quantities
from vqmoe_megatron.study.report.run_table import RunRow
from vqmoe_megatron.study.report.series import figure_of, label, naming_axes

DOUBLINGS = 6
KINDS = ("strong", "weak")


@dataclass(frozen=True)
class MeasuredLine:
    """Tokens per second and rank of one model by number of ranks, at least two; the spread over
    seeds is pooled over them."""

    kind: str  # one of KINDS
    label: str
    tokens_per_second_per_rank: dict[int, SeedMean]

    @property
    def efficiency(self) -> dict[int, SeedMean]:
        """Relative to the fewest ranks; intervals take the reference as exact."""
        reference = self.tokens_per_second_per_rank[min(self.tokens_per_second_per_rank)].mean
        return {
            ranks: SeedMean(
                speed.mean / reference,
                speed.num_seeds,
                None if speed.half_width is None else speed.half_width / reference,
                speed.num_degrees_of_freedom,
            )
            for ranks, speed in self.tokens_per_second_per_rank.items()
        }


@dataclass(frozen=True)
class PredictedLine:
    """The plan's efficiency of one model by number of ranks."""

    kind: str  # one of KINDS
    label: str
    efficiency: dict[int, float]


def scaling_lines(
    rows: Sequence[RunRow], hardware: str
) -> tuple[list[MeasuredLine], list[PredictedLine]]:
    """Return the lines that finished runs form, and the plan's for the same models.

    Where none is measured, the plan's lines are those of the largest models, one per series.
    """
    known = [row for row in rows if row.config is not None]
    models: dict[str, list[RunRow]] = {}
    for row in known:
        models.setdefault(_shared(row), []).append(row)
    labels = {key: _label(members, known) for key, members in models.items()}
    measured = {
        key: [line for kind in KINDS for line in _measured(kind, labels[key], members)]
        for key, members in models.items()
    }
    predicted_keys = [key for key in models if measured[key]]
    if not predicted_keys:
        by_size = sorted(models, key=_size(models))
        largest = {_series_label(models[key], known): key for key in by_size}
        predicted_keys = list(largest.values())
    predicted = [
        line
        for key in predicted_keys
        for kind in KINDS
        for line in _predicted(kind, labels[key], models[key], hardware)
    ]
    return [line for lines in measured.values() for line in lines], predicted


def _measured(kind: str, name: str, rows: Sequence[RunRow]) -> Iterator[MeasuredLine]:
    axes = _layout_axes(rows)
    alike: dict[tuple[str, float], dict[int, list[float]]] = {}
    for row in rows:
        speed = figure_of(row, "tokens_per_second")
        if row.is_finished and speed:
            batch = row.config.train.global_batch_size
            shared = batch if kind == "strong" else batch / row.num_ranks
            layout = f", {label(row, axes)}" if axes else ""
            by_ranks = alike.setdefault((layout, shared), {})
            by_ranks.setdefault(row.num_ranks, []).append(speed / row.num_ranks)
    num_batches = len({shared for _, shared in alike})
    for (layout, shared), by_ranks in alike.items():
        if len(by_ranks) > 1:
            means = dict(zip(by_ranks, seed_means(list(by_ranks.values())), strict=True))
            where = f", batch {shared:g}" if num_batches > 1 else ""
            yield MeasuredLine(kind, name + layout + where, dict(sorted(means.items())))


def _layout_axes(rows: Sequence[RunRow]) -> list[str]:
    """Axes in which runs of one model differ, other than those that stand for ranks, seed or batch:
    an axis stands for one of them when each of its values has one of theirs and the other way
    round."""
    others: tuple[Callable[[RunRow], int], ...] = (
        lambda row: row.num_ranks,
        lambda row: row.config.train.seed,
        lambda row: row.config.train.global_batch_size,
    )
    found = []
    for axis in dict.fromkeys(axis for row in rows for axis in row.point):
        values = {str(row.point.get(axis)) for row in rows}
        pairs = [{(str(row.point.get(axis)), other(row)) for row in rows} for other in others]
        stands_for = any(
            len(pair) == len(values) == len({second for _, second in pair}) for pair in pairs
        )
        if len(values) > 1 and not stands_for:
            found.append(axis)
    return found


def _predicted(
    kind: str, name: str, rows: Sequence[RunRow], hardware: str
) -> Iterator[PredictedLine]:
    planned = [row for row in rows if row.planned.predicted_tokens_per_second]
    if planned:
        row = min(planned, key=lambda row: row.num_ranks)
        speeds = _predicted_speeds(row, kind, hardware)
        if len(speeds) > 1:
            per_rank = speeds[row.num_ranks] / row.num_ranks
            efficiency = {ranks: speed / ranks / per_rank for ranks, speed in speeds.items()}
            yield PredictedLine(kind, name, efficiency)


def _predicted_speeds(row: RunRow, kind: str, hardware: str) -> dict[int, float]:
    """Tokens per second by number of ranks, as far as the batch and the layout divide."""
    speeds: dict[int, float] = {}
    for doubling in range(DOUBLINGS + 1):
        factor = 2**doubling
        config = _larger_batch(row.config, factor) if kind == "weak" else row.config
        planned = planned_quantities(config, row.num_ranks * factor, hardware)
        speed = planned.predicted_tokens_per_second
        if speed is None:
            break
        speeds[row.num_ranks * factor] = speed
    return speeds


def _larger_batch(config: RunConfig, factor: int) -> RunConfig:
    batch = config.train.global_batch_size * factor
    return replace(config, train=replace(config.train, global_batch_size=batch))


def _shared(row: RunRow) -> str:
    """What runs of one model have in common."""
    return json.dumps([asdict(row.config.model), asdict(row.config.vq)], sort_keys=True)


def _size(models: dict[str, list[RunRow]]) -> Callable[[str], int]:
    return lambda key: models[key][0].num_moe_experts or 0


def _label(members: Sequence[RunRow], rows: Sequence[RunRow]) -> str:
    series, size = _series_label(members, rows), f"{members[0].num_moe_experts} experts"
    return f"{series}, {size}" if series else size


def _series_label(members: Sequence[RunRow], rows: Sequence[RunRow]) -> str:
    """The axes that name series, as far as all runs of the model agree; maybe nothing."""
    shared = [
        axis
        for axis in naming_axes(rows)
        if len({str(row.point.get(axis)) for row in members}) == 1
    ]
    return label(members[0], shared) if shared else ""
