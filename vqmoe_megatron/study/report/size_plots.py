"""Throughput, traffic and routing against the number of experts.

Each drawing returns a figure, or a sentence that says why there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from vqmoe_megatron.study.report.planned import spread_over_ranks
from vqmoe_megatron.study.report.plot_style import (
    dodged,
    doubling_axis,
    legend_outside,
    panels,
    series_colour,
    series_marker,
    speed_axis,
)
from vqmoe_megatron.study.report.series import Series, figure_of

SPREAD_RANKS = 8
ROUTING = (
    ("moe/expert_load_imbalance", "load imbalance (busiest expert / mean)"),
    ("vq/code_perplexity", "code perplexity (codes)"),
    ("vq/dead_codes", "dead codes (sum over layers)"),
)


def draw_speed(series: Sequence[Series]) -> Figure | str:
    """Draw measured tokens per second, and predicted ones hollow."""
    figure, (axis,) = panels(1)
    measured = _draw_measured(axis, series, "tokens_per_second")
    predicted = _draw_planned(axis, series, "predicted_tokens_per_second", ", predicted")
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
    sizes = _draw_planned(axis, series, "wire_bytes_per_step", ", planned")
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
        sizes = _draw_measured(axis, series, metric)
        axis.set_ylabel(name)
        axis.set_ylim(bottom=0)
        doubling_axis(axis, sizes, "experts")
    entries = {
        text: handle
        for axis in axes
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4)
    return figure


def _draw_measured(axis: Axes, series: Sequence[Series], figure: str) -> set[int]:
    """Means over seeds with intervals, filled and solid; the sizes drawn."""
    sizes: set[int] = set()
    for index, one in enumerate(series):
        means = one.means(figure)
        if means:
            sizes |= set(means)
            axis.errorbar(
                dodged(list(means), index, len(series)),
                [mean.mean for mean in means.values()],
                [mean.half_width or 0.0 for mean in means.values()],
                color=series_colour(index),
                marker=series_marker(index),
                markersize=6,
                capsize=3,
                lw=1.4,
                label=one.label,
            )
    return sizes


def _draw_planned(axis: Axes, series: Sequence[Series], figure: str, suffix: str) -> set[int]:
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
            axis.plot(
                dodged(sizes, index, len(series)),
                [points[size] for size in sizes],
                linestyle="--",
                marker=series_marker(index),
                markerfacecolor="white",
                markersize=6.5,
                lw=1.2,
                color=series_colour(index),
                label=one.label + suffix,
            )
    return drawn
