"""Arms against a baseline over the number of experts, and the arms' bits per byte.

Each drawing returns a figure, or a sentence that says why there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from vqmoe_megatron.study.baselines import Arms
from vqmoe_megatron.study.report.paired import Comparison
from vqmoe_megatron.study.report.plot_style import (
    GREY,
    dodged,
    doubling_axis,
    draw_measured,
    legend_above,
    legend_outside,
    panels,
)
from vqmoe_megatron.study.report.series import Series

STYLE = {"markersize": 6, "lw": 1.4}


def draw_differences(
    comparisons: Sequence[Comparison],
    arms: Arms,
    figure: str,
    unit: str,
    panel_of: Callable[[Comparison], str],
) -> Figure | str:
    """Draw mean differences over the number of experts, a line per arm and a zero line.

    Args:
        comparisons: of :func:`~vqmoe_megatron.study.report.paired.compare_arms`.
        arms: whose order gives colours and markers.
        figure: the name of what differs.
        unit: of the difference, for the axis.
        panel_of: the title of the panel that a comparison is drawn in.
    """
    drawn = [
        (one, mean)
        for one in comparisons
        if one.num_moe_experts is not None and (mean := one.mean(figure)) is not None
    ]
    if not drawn:
        return "no two finished runs make a pair"
    titles = list(dict.fromkeys(panel_of(one) for one, _ in drawn))
    canvas, axes = panels(len(titles))
    for axis, title in zip(axes, titles, strict=True):
        here = [(one, mean) for one, mean in drawn if panel_of(one) == title]
        axis.axhline(0.0, color=GREY, lw=1)
        for index, arm in enumerate(arms.names):
            points = {one.num_moe_experts: mean for one, mean in here if one.arm == arm}
            if points:
                sizes = sorted(points)
                places = dodged(sizes, index, len(arms.names))
                means = [points[size] for size in sizes]
                draw_measured(axis, places, means, index, label=arm, **STYLE)
        axis.set_title(title, fontsize=11)
        doubling_axis(axis, {one.num_moe_experts for one, _ in here}, "experts")
        axis.set_ylabel(f"difference ({unit})")
    legend_above(canvas, axes, num_columns=4)
    return canvas


def draw_figure_of_arms(series: Sequence[Series], figure: str, unit: str) -> Figure | str:
    """Draw the means over seeds of a figure over the number of experts, a line per series."""
    canvas, (axis,) = panels(1)
    sizes: set[int] = set()
    for index, one in enumerate(series):
        if means := one.means(figure):
            sizes |= set(means)
            places = dodged(list(means), index, len(series))
            draw_measured(axis, places, means.values(), index, label=one.label, **STYLE)
    if not sizes:
        return "no finished run has a finite validation loss"
    axis.set_ylabel(f"validation loss ({unit})")
    doubling_axis(axis, sizes, "experts")
    legend_outside(axis)
    return canvas
