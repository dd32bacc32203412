"""Loss against experts with the fitted laws, and against tokens and operations.

Each drawing returns a figure, or a sentence that says why there is nothing to draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vqmoe_megatron.study.report.plot_style import (
    GREY,
    decade_axis,
    dodged,
    doubling_axis,
    legend_outside,
    loss_axis,
    panels,
    series_colour,
    series_marker,
    size_colours,
)
from vqmoe_megatron.study.report.scaling_law import Fits, fit_laws
from vqmoe_megatron.study.report.series import (
    FINAL_LOSS,
    Curve,
    Series,
    figure_of,
    mean_curves,
    single_curves,
)

NO_LOSS = "no finished run has a finite validation loss"


def fit_series(series: Sequence[Series]) -> dict[str, Fits]:
    """Fit both laws to the finished runs of every series with a finite loss, by its label."""
    found = {}
    for one in series:
        pairs = [
            (size, loss)
            for size, rows in one.cells.items()
            for row in rows
            if (loss := figure_of(row, FINAL_LOSS)) is not None
        ]
        sizes, losses = np.array(pairs, dtype=float).reshape(-1, 2).T
        found[one.label] = fit_laws(sizes, losses)
    return found


def draw_loss_experts(series: Sequence[Series], fits: Mapping[str, Fits]) -> Figure | str:
    """Draw final losses of runs, their means with intervals, and the laws with their bands."""
    drawn = [one for one in series if one.means(FINAL_LOSS)]
    if not drawn:
        return NO_LOSS
    figure, (axis,) = panels(1)
    sizes: set[int] = set()
    for index, one in enumerate(drawn):
        colour, means = series_colour(index), one.means(FINAL_LOSS)
        sizes |= set(means)
        places = dodged(list(means), index, len(drawn))
        for place, (size, mean) in zip(places, means.items(), strict=True):
            found = (figure_of(row, FINAL_LOSS) for row in one.cells[size])
            losses = [loss for loss in found if loss is not None]
            axis.plot([place] * len(losses), losses, ".", color=colour, alpha=0.45, markersize=5)
            if mean.half_width is not None:
                axis.errorbar(place, mean.mean, mean.half_width, color=colour, capsize=3, lw=1.3)
        axis.plot(
            places,
            [mean.mean for mean in means.values()],
            series_marker(index),
            color=colour,
            markersize=6,
            label=f"{one.label}, mean",
        )
        _draw_law(axis, fits[one.label], one.label, sorted(means), colour)
    loss_axis(axis)
    doubling_axis(axis, sizes, "experts")
    legend_outside(axis)
    return figure


def _draw_law(axis: Axes, fits: Fits, name: str, sizes: list[int], colour) -> None:
    law = fits.power_law or fits.doubling
    if law is None:
        return
    kind = "power law" if fits.power_law else "log2 line"
    places = np.geomspace(sizes[0], sizes[-1], 100)
    axis.plot(places, law.losses(places), "--", color=colour, lw=1.4, label=f"{name}, {kind}")
    axis.fill_between(places, *law.band(places), color=colour, alpha=0.12, linewidth=0)


def draw_loss_curves(series: Sequence[Series], by_flops: bool) -> Figure | str:
    """Draw validation loss against training tokens, or operations, one panel per series.

    ``by_flops`` leaves out runs whose plan does not say their operations.
    """
    found = [(one, mean_curves(one), single_curves(one)) for one in series]
    found = [(one, curves, rest) for one, curves, rest in found if curves or rest]
    if not found:
        return "no run has a finite validation loss after its start"
    if (
        by_flops
        and not any(curve.flops_per_token for _, curves, _ in found for curve in curves)
        and not any(row.planned.flops_per_token for _, _, rest in found for row, _, _ in rest)
    ):
        return "the operations of no run are known"
    sizes = {size for one, _, _ in found for size in (row.num_moe_experts for row in one.rows)}
    colours = size_colours(sizes)
    figure, axes = panels(len(found), share_y=True)
    for axis, (one, curves, rest) in zip(axes, found, strict=True):
        for curve in curves:
            _draw_curve(axis, curve, colours[curve.num_moe_experts], by_flops)
        for row, tokens, losses in rest:
            scale = row.planned.flops_per_token if by_flops else 1
            if scale:
                axis.plot(
                    np.multiply(tokens, float(scale)),
                    losses,
                    ":",
                    color=colours[row.num_moe_experts],
                    lw=1.2,
                    marker="x",
                    markersize=6,
                )
        axis.set_title(one.label, fontsize=11)
        decade_axis(axis, "training operations (FLOPs)" if by_flops else "training tokens")
    loss_axis(axes[0])
    for size in sorted(sizes):
        axes[0].plot([], [], color=colours[size], lw=2, label=f"{size}")
    if any(rest for _, _, rest in found):
        axes[0].plot([], [], ":x", color=GREY, label="unfinished or diverged")
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        title="experts",
        loc="outside right upper",
        fontsize=9.5,
    )
    return figure


def _draw_curve(axis: Axes, curve: Curve, colour, by_flops: bool) -> None:
    scale = curve.flops_per_token if by_flops else 1
    if not scale:
        return
    places = np.multiply(curve.num_tokens, float(scale))
    means = [mean.mean for mean in curve.means]
    axis.plot(places, means, color=colour, lw=1.6, marker="o", markersize=2.5)
    if any(mean.half_width is not None for mean in curve.means):
        low, high = [mean.low for mean in curve.means], [mean.high for mean in curve.means]
        axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
