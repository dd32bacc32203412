"""What a report says: its head, its plots with their captions, its tables.

A caption states what is plotted, what the bars and bands are, and what was not measured.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from matplotlib.figure import Figure

from vqmoe_megatron.studies.report.intervals import seed_means
from vqmoe_megatron.studies.report.loss_plots import (
    draw_loss_curves,
    draw_loss_experts,
    fit_series,
)
from vqmoe_megatron.studies.report.page import Page, Plot, Section, Table
from vqmoe_megatron.studies.report.plot_style import report_style
from vqmoe_megatron.studies.report.run_table import (
    LATE_METRICS,
    LATE_SHARE,
    WARM_UP_SHARE,
    Study,
)
from vqmoe_megatron.studies.report.scaling import scaling_lines
from vqmoe_megatron.studies.report.scaling_law import EXPONENTS, NUM_DRAWS, Fits
from vqmoe_megatron.studies.report.scaling_plots import draw_scaling
from vqmoe_megatron.studies.report.series import Series, figure_of, split_series
from vqmoe_megatron.studies.report.size_plots import (
    SPREAD_RANKS,
    are_single_ranks,
    draw_routing,
    draw_speed,
    draw_wire,
)

DPI = 130
RULES = {
    "equal_tokens": "equal tokens: every run reads the same number of training tokens",
    "equal_flops": "equal FLOPs: every run gets the same number of training operations",
    "as_written": "as written: the recipe and the grid set the length of every run",
}
PLOT_NAMES = (
    "loss_experts.png",
    "loss_tokens.png",
    "loss_flops.png",
    "tokens_per_second.png",
    "wire_bytes.png",
    "routing.png",
    "scaling.png",
)
POOLED = (
    "95% t-intervals of the mean over seeds; the standard deviation over seeds is pooled over the "
    "points of a curve, which takes it to be the same at all of them"
)


def build_page(study: Study, origin: dict[str, Any], now: datetime) -> Page:
    """Return the report of ``study``. Draws every plot; no communication."""
    series = split_series(study.rows)
    fits = fit_series(series)
    seeds = _seeds(series)
    with report_style():
        sections = [
            _runs_summary(study),
            _against_experts(series, fits, seeds),
            _curves(series, seeds),
            _speed(study, series, seeds),
            _routing(series, seeds),
            _scaling(study),
            _all_runs(study),
        ]
    return Page(f"Study {study.name}", _facts(study, origin, now), [s for s in sections if s])


def _facts(study: Study, origin: dict[str, Any], now: datetime) -> list[tuple[str, str]]:
    machine, versions = origin["machine"], origin["versions"]
    changed = ", with uncommitted changes" if origin["uncommitted_changes"] else ""
    ranks = sorted({row.num_ranks for row in study.rows})
    return [
        ("Study", study.name),
        ("Rule", RULES.get(study.rule, study.rule)),
        ("Runs", f"{len(study.finished)} finished, {len(study.rows) - len(study.finished)} not"),
        ("Ranks per run", ", ".join(map(str, ranks))),
        ("Report made", now.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        ("By commit", (origin["commit"] or "unknown")[:12] + changed),
        (
            "On machine",
            f"{machine['cores']} cores ({machine['processor']}), "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB, GPU: {machine['gpu'] or 'none'}, Python "
            f"{machine['python']}, torch {versions['torch']}, megatron-core "
            f"{versions['megatron-core']}",
        ),
    ]


def _runs_summary(study: Study) -> Section | None:
    rest = [row for row in study.rows if not row.is_finished]
    if not rest:
        return None
    counts = Counter(row.state for row in rest)
    lines = [
        [
            row.name,
            row.state,
            _whole(row.iteration),
            _whole(row.config.train.train_iters if row.config else None),
            row.reason or row.planned.reason,
        ]
        for row in rest
    ]
    return Section(
        "Runs that have not finished",
        [
            f"{', '.join(f'{number} {state}' for state, number in counts.items())}: these enter no "
            "mean, fit or bar below; the curves show how far they came."
        ],
        tables=[Table(["name", "state", "iteration", "of", "reason"], lines)],
    )


def _against_experts(series: Sequence[Series], fits: dict[str, Fits], seeds: str) -> Section:
    caption = (
        "Validation loss at the end of finished runs against the number of experts, both axes "
        f"logarithmic. Dots: single runs. Markers: means over seeds ({seeds}). Bars: {POOLED}. "
        "Dashed: the fitted law with its 95% band. Not measured: what a learning rate or a length "
        "chosen for each size would reach, and any size between or beyond the markers."
    )
    plots, said = _plot("loss_experts.png", draw_loss_experts(series, fits), caption)
    paragraphs = [
        "The fitted laws are L(N) = L_inf + a N^-b over all finished runs of a series, and the "
        "line L(N) = c + d log2 N, where d is the change of loss per doubling of experts. In "
        f"brackets 95% intervals: for the power law from {NUM_DRAWS:,} bootstrap draws of "
        f"residuals, b searched between {EXPONENTS[0]:g} and {EXPONENTS[-1]:g}, for the line from "
        "Student's t. They take runs to be independent: where one seed is better at every size, "
        "the intervals of a, b and d are wider than need be. They do not say whether the law holds "
        "elsewhere."
    ]
    tables = [_fit_table(fits), _mean_table(series)]
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


def _mean_table(series: Sequence[Series]) -> Table:
    lines = []
    for one in series:
        for size, mean in one.means("final_val_loss").items():
            losses = [figure_of(row, "final_val_loss") for row in one.cells[size]]
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


def _curves(series: Sequence[Series], seeds: str) -> Section:
    common = (
        f"Lines: means over the seeds of finished runs ({seeds}), at evaluations that all of them "
        f"have. Bands: {POOLED}, here over the numbers of experts in a panel. Dotted with crosses: "
        "single runs that have not finished. The evaluation before training is left out."
    )
    tokens, said_tokens = _plot(
        "loss_tokens.png",
        draw_loss_curves(series, by_flops=False),
        f"Validation loss against training tokens, both axes logarithmic. {common} Not measured: "
        "the training loss between evaluations, and shorter learning-rate schedules; a point in "
        "the middle of a curve is not the result of a run of that length.",
    )
    flops, said_flops = _plot(
        "loss_flops.png",
        draw_loss_curves(series, by_flops=True),
        f"The same losses against training operations. {common} Operations are the plan's "
        "per-token figure times tokens, matrix products only. Not measured: operations are not "
        "counted by hardware, and say nothing about time.",
    )
    return Section(
        "Loss against tokens and operations", [*said_tokens, *said_flops], tokens + flops
    )


def _speed(study: Study, series: Sequence[Series], seeds: str) -> Section:
    speed, said_speed = _plot(
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
    wire, said_wire = _plot(
        "wire_bytes.png",
        draw_wire(series, study.hardware),
        "Bytes that the busiest rank sends in an optimizer step, against the number of experts"
        f"{spread}. Hollow "
        "and dashed: planned from sizes with equally loaded experts. Not measured: these are "
        "formulas, not counts of the runs; an unequal load moves other bytes.",
    )
    return Section("Throughput and wire bytes", [*said_speed, *said_wire], speed + wire)


def _routing(series: Sequence[Series], seeds: str) -> Section:
    plots, said = _plot(
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


def _scaling(study: Study) -> Section:
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
    plots, said = _plot("scaling.png", draw_scaling(measured, predicted), caption)
    if plots and not measured:
        said = ["No line is measured: all finished runs of a model used one number of ranks."]
    return Section("Weak and strong scaling", said, plots)


def _all_runs(study: Study) -> Section:
    lines = [
        [
            row.name,
            row.state,
            _number(row.final_val_loss),
            _number(row.final_bits_per_byte),
            _whole(row.num_tokens),
            "" if row.num_flops is None else f"{row.num_flops:.2e}",
            _whole(row.planned.num_parameters_total),
            _whole(row.planned.num_parameters_active),
            _whole(row.tokens_per_second),
            _whole(row.planned.wire_bytes_per_step),
            *(_number(row.late.get(metric), 2) for metric in LATE_METRICS),
        ]
        for row in study.rows
    ]
    headings = [
        "name",
        "state",
        "val loss",
        "bits/byte",
        "tokens",
        "FLOPs",
        "parameters",
        "active",
        "tokens/s",
        "wire bytes",
        "imbalance",
        "perplexity",
        "dead",
    ]
    caption = (
        "runs.csv holds these figures unrounded, the axes, and more. Parameters, FLOPs and wire "
        "bytes (of the busiest rank, per step) are planned, the rest is measured."
    )
    return Section("All runs", tables=[Table(headings, lines, caption)])


def _plot(name: str, drawn: Figure | str, caption: str) -> tuple[list[Plot], list[str]]:
    """Return the plot as PNG, or the sentence that says why there is none."""
    if isinstance(drawn, str):
        return [], [f"No plot {name}: {drawn}."]
    stream = io.BytesIO()
    drawn.savefig(stream, format="png", dpi=DPI)
    return [Plot(name, stream.getvalue(), caption.split(".")[0], caption)], []


def _seeds(series: Sequence[Series]) -> str:
    """``n = 2``, or the range over all points of the study."""
    counts = sorted({len(rows) for one in series for rows in one.cells.values()})
    if not counts:
        return "no finished run"
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _number(value: float | None, num_decimals: int = 4) -> str:
    return "" if value is None else f"{value:,.{num_decimals}f}"
