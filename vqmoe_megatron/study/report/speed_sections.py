"""Throughput, traffic, routing and scaling in a report.

A caption counts the seeds of the means that its plot draws.
"""

from __future__ import annotations

from collections.abc import Sequence

from vqmoe_megatron.study.report.captions import POOLED, plot_or_reason, seeds_of
from vqmoe_megatron.study.report.page import Section
from vqmoe_megatron.study.report.run_table import (
    LATE_METRICS,
    LATE_SHARE,
    WARM_UP_SHARE,
    ReportedStudy,
)
from vqmoe_megatron.study.report.scaling import scaling_lines
from vqmoe_megatron.study.report.scaling_plots import draw_scaling
from vqmoe_megatron.study.report.series import Series
from vqmoe_megatron.study.report.size_plots import (
    SPREAD_RANKS,
    are_single_ranks,
    draw_routing,
    draw_speed,
    draw_wire,
)


def speed_and_wire(study: ReportedStudy, series: Sequence[Series]) -> Section:
    """Measured and predicted throughput, and planned wire bytes, by number of experts."""
    seeds = seeds_of(mean for one in series for mean in one.means("tokens_per_second").values())
    speed, said_speed = plot_or_reason(
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
    wire, said_wire = plot_or_reason(
        "wire_bytes.png",
        draw_wire(series, study.hardware),
        "Bytes that the busiest rank sends in an optimizer step, against the number of experts"
        f"{spread}. Hollow "
        "and dashed: planned from sizes with equally loaded experts. Not measured: these are "
        "formulas, not counts of the runs; an unequal load moves other bytes.",
    )
    return Section("Throughput and wire bytes", [*said_speed, *said_wire], speed + wire)


def routing(series: Sequence[Series]) -> Section:
    """Load imbalance, code perplexity and dead codes by number of experts."""
    seeds = seeds_of(
        mean for one in series for metric in LATE_METRICS for mean in one.means(metric).values()
    )
    plots, said = plot_or_reason(
        "routing.png",
        draw_routing(series),
        f"Routing at the end of training against the number of experts: means over the last "
        f"{LATE_SHARE:.0%} of a run's logged steps and over seeds ({seeds}). Bars: {POOLED}. Load "
        "imbalance is the busiest expert's tokens over the mean, averaged over layers; 1 is "
        "balanced. Code perplexity is exp(entropy) of code usage, averaged over layers. Dead codes "
        "are codes that no token of a step chose, summed over layers, so they depend on the batch. "
        "Series without codes have neither. Not measured: routing on validation text.",
    )
    return Section("Routing", said, plots)


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
    plots, said = plot_or_reason("scaling.png", draw_scaling(measured, predicted), caption)
    if plots and not measured:
        said = ["No line is measured: all finished runs of a model used one number of ranks."]
    return Section("Weak and strong scaling", said, plots)
