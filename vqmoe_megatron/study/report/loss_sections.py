"""The loss in a report: against experts with the fitted laws, and during training.

A caption counts the seeds of the means that its plot draws.
"""

from __future__ import annotations

from collections.abc import Sequence

from vqmoe_megatron.study.report.captions import POOLED, plot_or_reason, seeds_of
from vqmoe_megatron.study.report.intervals import seed_means
from vqmoe_megatron.study.report.loss_plots import (
    draw_loss_curves,
    draw_loss_experts,
    fit_series,
)
from vqmoe_megatron.study.report.page import Section, Table
from vqmoe_megatron.study.report.scaling_law import EXPONENTS, NUM_DRAWS, Fits
from vqmoe_megatron.study.report.series import FINAL_LOSS, Series, figure_of, mean_curves


def against_experts(series: Sequence[Series]) -> Section:
    """Final losses by number of experts, with the fitted laws. Fits; no communication."""
    fits = fit_series(series)
    seeds = seeds_of(mean for one in series for mean in one.means(FINAL_LOSS).values())
    caption = (
        "Validation loss at the end of finished runs against the number of experts, both axes "
        "logarithmic; runs without a finite one are left out. Dots: single runs. Markers: means "
        f"over seeds ({seeds}). Bars: {POOLED}. "
        "Dashed: the fitted law with its 95% band. Not measured: what a learning rate or a length "
        "chosen for each size would reach, and any size between or beyond the markers."
    )
    plots, said = plot_or_reason("loss_experts.png", draw_loss_experts(series, fits), caption)
    paragraphs = [
        "The fitted laws are L(N) = L_inf + a N^-b and the line L(N) = c + d log2 N, where d is "
        "the change of loss per doubling of experts, both over the finished runs of a series with "
        f"a finite loss. In brackets 95% intervals: for the power law from {NUM_DRAWS:,} bootstrap "
        f"draws of residuals, b searched between {EXPONENTS[0]:g} and {EXPONENTS[-1]:g}, for the "
        "line from Student's t. They take runs to be independent: where one seed is better at "
        "every size, the intervals of a, b and d are wider than need be. They do not say whether "
        "the law holds elsewhere."
    ]
    tables = [_fit_table(fits), mean_table(series)]
    return Section(
        "Loss against experts", [*said, *paragraphs], plots, [one for one in tables if one.lines]
    )


def _fit_table(fits: dict[str, Fits]) -> Table:
    lines = []
    for label, fit in fits.items():
        law = fit.power_law
        if law is not None:
            floor, coefficient, exponent = law.floor, law.coefficient, law.exponent
            fitted = f"L_inf = {floor}, a = {coefficient}, b = {exponent}"
            lines.append([label, "power law", fitted, str(law.num_runs), f"{law.residual_std:.4f}"])
        else:
            lines.append([label, "power law", f"not determined: {fit.power_law_reason}", "", ""])
        line = fit.doubling
        if line is not None:
            fitted = f"c = {line.at_one}, d = {line.per_doubling} per doubling"
            found = [label, "log2 line", fitted, str(line.num_runs), f"{line.residual_std:.4f}"]
            lines.append(found)
        else:
            lines.append([label, "log2 line", f"not determined: {fit.doubling_reason}", "", ""])
    return Table(["series", "law", "fit with 95% intervals", "runs", "residual std (nats)"], lines)


def mean_table(series: Sequence[Series]) -> Table:
    """Means over seeds of the final loss with both intervals, a line per point."""
    lines = []
    for one in series:
        for size, mean in one.means(FINAL_LOSS).items():
            losses = [figure_of(row, FINAL_LOSS) for row in one.cells[size]]
            (alone,) = seed_means([[loss for loss in losses if loss is not None]])
            intervals = [
                "" if found.half_width is None else f"{found.low:.4f} to {found.high:.4f}"
                for found in (mean, alone)
            ]
            lines.append(
                [one.label, str(size), str(mean.num_seeds), f"{mean.mean:.4f}", *intervals]
            )
    return Table(
        ["series", "experts", "seeds n", "mean val loss", "95%, pooled", "95%, own seeds only"],
        lines,
        "The last column uses the seeds of that point alone (n - 1 degrees of freedom): no "
        "assumption about other points, and wide for two seeds.",
    )


def loss_curves(series: Sequence[Series]) -> Section:
    """Losses during training, against tokens and against operations."""
    tokens, said_tokens = plot_or_reason(
        "loss_tokens.png",
        draw_loss_curves(series, by_flops=False),
        "Validation loss against training tokens, both axes logarithmic. "
        f"{_curve_caption(series, by_flops=False)} Not measured: "
        "the training loss between evaluations, and shorter learning-rate schedules; a point in "
        "the middle of a curve is not the result of a run of that length.",
    )
    flops, said_flops = plot_or_reason(
        "loss_flops.png",
        draw_loss_curves(series, by_flops=True),
        "The same losses against training operations. "
        f"{_curve_caption(series, by_flops=True)} Operations are the plan's "
        "per-token figure times tokens, matrix products only. Not measured: operations are not "
        "counted by hardware, and say nothing about time.",
    )
    return Section(
        "Loss against tokens and operations", [*said_tokens, *said_flops], tokens + flops
    )


def _curve_caption(series: Sequence[Series], by_flops: bool) -> str:
    drawn = [
        curve
        for one in series
        for curve in mean_curves(one)
        if not by_flops or curve.flops_per_token
    ]
    seeds = seeds_of(mean for curve in drawn for mean in curve.means)
    return (
        f"Lines: means over the seeds of finished runs with a finite loss at their end ({seeds}), "
        f"at evaluations that all of them have. Bands: {POOLED}, here over the numbers of experts "
        "in a panel. Dotted with crosses: single runs that have not finished or diverged, as far "
        "as their loss is finite; they are in no mean. The evaluation before training is left out."
    )
