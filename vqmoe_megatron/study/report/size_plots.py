"""Throughput, traffic and routing against the number of experts, efficiency against ranks.

Each drawing returns a figure, or a sentence that says why there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from vqmoe_megatron.study.report.planned import spread_over_ranks
from vqmoe_megatron.study.report.plot_style import (
    GREY,
    dodged,
    doubling_axis,
    draw_measured,
    draw_planned,
    legend_above,
    legend_outside,
    panels,
    speed_axis,
)
from vqmoe_megatron.study.report.scaling import KINDS, MeasuredLine, PredictedLine
from vqmoe_megatron.study.report.series import Series, figure_of

SPREAD_RANKS = 8
MEANING = {"strong": "strong: same global batch", "weak": "weak: same batch per rank"}
ROUTING = (
    ("moe/expert_load_imbalance", "load imbalance (busiest expert / mean)"),
    ("vq/code_perplexity", "code perplexity (codes)"),
    ("vq/dead_codes", "dead codes (sum over layers)"),
)


def draw_speed(series: Sequence[Series]) -> Figure | str:
    """Draw measured tokens per second, and predicted ones hollow."""
    figure, (axis,) = panels(1)
    measured = _measured(axis, series, "tokens_per_second")
    predicted = _planned(axis, series, "predicted_tokens_per_second", ", predicted")
    if not measured and not predicted:
        return "no finished run has a throughput, and none is predicted"
    means = [mean.mean for one in series for mean in one.means("tokens_per_second").values()]
    plans = [row.planned.predicted_tokens_per_second for one in series for row in one.rows]
    speed_axis(axis, [*means, *filter(None, plans)])
    axis.set_ylabel("tokens per second")
    doubling_axis(axis, measured | predicted, "experts")
    legend_outside(axis)
    return figure


def draw_wire(series: Sequence[Series], hardware: str) -> Figure | str:
    """Draw planned wire bytes of one rank and step.

    Runs of one rank send nothing; a study of such runs is drawn as if spread over
    ``SPREAD_RANKS`` ranks.
    """
    figure, (axis,) = panels(1)
    if are_single_ranks(series):
        series = [_spread(one, hardware) for one in series]
        axis.set_title(f"as if on {SPREAD_RANKS} ranks", fontsize=11)
    sizes = _planned(axis, series, "wire_bytes_per_step", ", planned")
    if not sizes:
        return "the plan gives wire bytes for no run"
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(EngFormatter("B"))
    axis.set_ylabel("bytes sent per rank and step")
    doubling_axis(axis, sizes, "experts")
    legend_outside(axis)
    return figure


def are_single_ranks(series: Sequence[Series]) -> bool:
    """Whether every run has one rank."""
    return all(row.num_ranks == 1 for one in series for row in one.rows)


def _spread(one: Series, hardware: str) -> Series:
    rows = [
        replace(row, planned=spread_over_ranks(row.config, SPREAD_RANKS, hardware))
        for row in one.rows
        if row.config is not None
    ]
    return Series(one.label, rows)


def draw_routing(series: Sequence[Series]) -> Figure | str:
    """Draw load imbalance, code perplexity and dead codes, one panel each."""
    shown = [(metric, name) for metric, name in ROUTING if any(one.means(metric) for one in series)]
    if not shown:
        return "no finished run has routing metrics"
    figure, axes = panels(len(shown))
    for axis, (metric, name) in zip(axes, shown, strict=True):
        sizes = _measured(axis, series, metric)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        doubling_axis(axis, sizes, "experts")
    legend_above(figure, axes, num_columns=4)
    return figure


def _measured(axis: Axes, series: Sequence[Series], figure: str) -> set[int]:
    """Means over seeds with intervals, filled and solid; the sizes drawn."""
    sizes: set[int] = set()
    for index, one in enumerate(series):
        means = one.means(figure)
        if means:
            sizes |= set(means)
            places, style = dodged(list(means), index, len(series)), {"markersize": 6, "lw": 1.4}
            draw_measured(axis, places, means.values(), index, label=one.label, **style)
    return sizes


def _planned(axis: Axes, series: Sequence[Series], figure: str, suffix: str) -> set[int]:
    """What the plan says of every configuration, run or not, hollow and dashed; the sizes drawn."""
    drawn: set[int] = set()
    for index, one in enumerate(series):
        points = {
            row.num_moe_experts: value
            for row in one.rows
            if (value := figure_of(row, f"plan.{figure}")) is not None
        }
        if points:
            drawn |= set(points)
            sizes = sorted(points)
            places, style = dodged(sizes, index, len(series)), {"markersize": 6.5, "lw": 1.2}
            values = [points[size] for size in sizes]
            draw_planned(axis, places, values, index, label=one.label + suffix, **style)
    return drawn


def draw_scaling(
    measured: Sequence[MeasuredLine], predicted: Sequence[PredictedLine]
) -> Figure | str:
    """Draw one panel for strong and one for weak scaling, as far as there are lines.

    Returns a sentence when there are none.
    """
    kinds = [kind for kind in KINDS if any(one.kind == kind for one in (*measured, *predicted))]
    if not kinds:
        return (
            "all finished runs of a model used the same number of ranks, and the plan predicts "
            "no step time"
        )
    labels = list(dict.fromkeys(one.label for one in (*measured, *predicted)))
    figure, axes = panels(len(kinds), share_y=True)
    for axis, kind in zip(axes, kinds, strict=True):
        ranks: set[int] = set()
        for lines, draw, word in (
            (measured, draw_measured, "measured"),
            (predicted, draw_planned, "predicted"),
        ):
            for one in lines:
                if one.kind == kind:
                    index, points = labels.index(one.label), one.efficiency
                    ranks |= set(points)
                    name = f"{one.label}, {word}"
                    draw(axis, list(points), points.values(), index, label=name)
        axis.axhline(1.0, color=GREY, lw=1)
        axis.set_title(MEANING[kind], fontsize=11)
        doubling_axis(axis, ranks, "ranks")
    points = [point.high for one in measured for point in one.efficiency.values()]
    points += [value for line in predicted for value in line.efficiency.values()]
    axes[0].set_ylim(0, 1.08 * max(1.0, *points))
    axes[0].set_ylabel("efficiency (tokens/s per rank,\nrelative to the fewest ranks)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    legend_above(figure, axes, num_columns=2)
    return figure
