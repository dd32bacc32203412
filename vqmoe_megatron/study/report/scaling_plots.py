"""Scaling efficiency against ranks: measured lines filled, predicted ones hollow and dashed."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from vqmoe_megatron.study.report.plot_style import (
    GREY,
    doubling_axis,
    panels,
    series_colour,
    series_marker,
)
from vqmoe_megatron.study.report.scaling import KINDS, MeasuredLine, PredictedLine

MEANING = {"strong": "strong: same global batch", "weak": "weak: same batch per rank"}


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
        for one in measured:
            if one.kind == kind:
                index, points = labels.index(one.label), one.efficiency
                ranks |= set(points)
                axis.errorbar(
                    list(points),
                    [point.mean for point in points.values()],
                    [point.half_width or 0.0 for point in points.values()],
                    color=series_colour(index),
                    marker=series_marker(index),
                    capsize=3,
                    label=f"{one.label}, measured",
                )
        for line in predicted:
            if line.kind == kind:
                index = labels.index(line.label)
                ranks |= set(line.efficiency)
                axis.plot(
                    list(line.efficiency),
                    list(line.efficiency.values()),
                    "--",
                    color=series_colour(index),
                    marker=series_marker(index),
                    markerfacecolor="white",
                    label=f"{line.label}, predicted",
                )
        axis.axhline(1.0, color=GREY, lw=1)
        axis.set_title(MEANING[kind], fontsize=11)
        doubling_axis(axis, ranks, "ranks")
    points = [point.high for one in measured for point in one.efficiency.values()]
    points += [value for line in predicted for value in line.efficiency.values()]
    axes[0].set_ylim(0, 1.08 * max(1.0, *points))
    axes[0].set_ylabel("efficiency (tokens/s per rank,\nrelative to the fewest ranks)")
    axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    entries = {
        text: handle
        for axis in axes
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=2)
    return figure
