"""The sections of a report that have plots: loss, throughput, traffic, routing, scaling.

A caption states what is plotted, what the bars and bands are, and what was not measured. It counts
the seeds of the means that its plot draws.
"""

from __future__ import annotations

from collections.abc import Sequence

from vqmoe_megatron.study.report.intervals import POOLED, seed_means, seeds_of
from vqmoe_megatron.study.report.loss_plots import (
    draw_loss_curves,
    draw_loss_experts,
    fit_series,
)
from vqmoe_megatron.study.report.page import Section, Table, drawn_section
from vqmoe_megatron.study.report.run_table import (
    LATE_METRICS,
    LATE_SHARE,
    WARM_UP_SHARE,
    ReportedStudy,
)
from vqmoe_megatron.study.report.scaling import scaling_lines
from vqmoe_megatron.study.report.scaling_law import EXPONENTS, NUM_DRAWS, Fits
from vqmoe_megatron.study.report.series import FINAL_LOSS, Series, figure_of, mean_curves
from vqmoe_megatron.study.report.size_plots import (
    SPREAD_RANKS,
    are_single_ranks,
    draw_routing,
    draw_scaling,
    draw_speed,
    draw_wire,
)


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
    laws = (
        "The fitted laws are L(N) = L_inf + a N^-b and the line L(N) = c + d log2 N, where d is "
        "the change of loss per doubling of experts, both over the finished runs of a series with "
        f"a finite loss. In brackets 95% intervals: for the power law from {NUM_DRAWS:,} bootstrap "
        f"draws of residuals, b searched between {EXPONENTS[0]:g} and {EXPONENTS[-1]:g}, for the "
        "line from Student's t. They take runs to be independent: where one seed is better at "
        "every size, the intervals of a, b and d are wider than need be. They do not say whether "
        "the law holds elsewhere."
    )
    return drawn_section(
        "Loss against experts",
        [("loss_experts.png", draw_loss_experts(series, fits), caption)],
        [laws],
        [table for table in (_fit_table(fits), mean_table(series)) if table.lines],
    )


def _fit_table(fits: dict[str, Fits]) -> Table:
    lines = []
    for label, fit in fits.items():
        for kind, law, reason in (
            ("power law", fit.power_law, fit.power_law_reason),
            ("log2 line", fit.doubling, fit.doubling_reason),
        ):
            if law is None:
                lines.append([label, kind, f"not determined: {reason}", "", ""])
            else:
                numbers = [str(law.num_runs), f"{law.residual_std:.4f}"]
                lines.append([label, kind, law.fitted, *numbers])
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
    tokens = (
        "loss_tokens.png",
        draw_loss_curves(series, by_flops=False),
        "Validation loss against training tokens, both axes logarithmic. "
        f"{_curve_caption(series, by_flops=False)} Not measured: "
        "the training loss between evaluations, and shorter learning-rate schedules; a point in "
        "the middle of a curve is not the result of a run of that length.",
    )
    flops = (
        "loss_flops.png",
        draw_loss_curves(series, by_flops=True),
        "The same losses against training operations. "
        f"{_curve_caption(series, by_flops=True)} Operations are the plan's "
        "per-token figure times tokens, matrix products only. Not measured: operations are not "
        "counted by hardware, and say nothing about time.",
    )
    return drawn_section("Loss against tokens and operations", [tokens, flops])


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


def speed_and_wire(study: ReportedStudy, series: Sequence[Series]) -> Section:
    """Measured and predicted throughput, and planned wire bytes, by number of experts."""
    seeds = seeds_of(mean for one in series for mean in one.means("tokens_per_second").values())
    speed = (
        "tokens_per_second.png",
        draw_speed(series),
        "Training throughput of a whole run against the number of experts. Filled: median over a "
        f"run's logged windows without its first {WARM_UP_SHARE:.0%}, mean over seeds ({seeds}); "
        f"bars: {POOLED}. Hollow and dashed: predicted by the plan with the hardware profile "
        f"{study.hardware}. Not "
        "measured: the machine at rest. Runs of a study may share it, so these are no benchmark "
        "figures; `vqmoe bench` measures arms side by side.",
    )
    spread = (
        f". The runs have one rank each and send nothing; this is what they would send on "
        f"{SPREAD_RANKS} ranks that share the experts, with {SPREAD_RANKS} times the batch"
        if are_single_ranks(series)
        else ""
    )
    wire = (
        "wire_bytes.png",
        draw_wire(series, study.hardware),
        "Bytes that the busiest rank sends in an optimizer step, against the number of experts"
        f"{spread}. Hollow "
        "and dashed: planned from sizes with equally loaded experts. Not measured: these are "
        "formulas, not counts of the runs; an unequal load moves other bytes.",
    )
    return drawn_section("Throughput and wire bytes", [speed, wire])


def routing(series: Sequence[Series]) -> Section:
    """Load imbalance, code perplexity and dead codes by number of experts."""
    seeds = seeds_of(
        mean for one in series for metric in LATE_METRICS for mean in one.means(metric).values()
    )
    caption = (
        f"Routing at the end of training against the number of experts: means over the last "
        f"{LATE_SHARE:.0%} of a run's logged steps and over seeds ({seeds}). Bars: {POOLED}. Load "
        "imbalance is the busiest expert's tokens over the mean, averaged over layers; 1 is "
        "balanced. Code perplexity is exp(entropy) of code usage, averaged over layers. Dead codes "
        "are codes that no token of a step chose, summed over layers, so they depend on the batch. "
        "Series without codes have neither. Not measured: routing on validation text."
    )
    return drawn_section("Routing", [("routing.png", draw_routing(series), caption)])


def scaling(study: ReportedStudy) -> Section:
    """Efficiency by number of ranks, measured and predicted."""
    measured, predicted = scaling_lines(study.rows, study.hardware)
    caption = (
        "Tokens per second and rank, relative to the fewest ranks of a line: 100% is perfect. "
        f"Filled and solid: measured; bars: {POOLED}, the reference taken as exact. Hollow and "
        "dashed: predicted by the plan with the hardware profile "
        f"{study.hardware} for the measured models, or else for "
        "the largest model of a series; more ranks are more data-parallel replicas. Not measured: "
        "every hollow point; predictions have no interval, equally loaded experts and a quiet "
        "network."
    )
    said = []
    if predicted and not measured:
        said = ["No line is measured: all finished runs of a model used one number of ranks."]
    drawing = "scaling.png", draw_scaling(measured, predicted), caption
    return drawn_section("Weak and strong scaling", [drawing], said)
