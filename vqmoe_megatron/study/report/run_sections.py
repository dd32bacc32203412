"""The tables of runs: unfinished ones, finished ones without a loss, and all."""

from __future__ import annotations

import math
from collections import Counter

from vqmoe_megatron.study.report.page import Section, Table
from vqmoe_megatron.study.report.run_table import LATE_METRICS, ReportedStudy
from vqmoe_megatron.study.report.series import has_loss


def unfinished_runs(study: ReportedStudy) -> Section | None:
    """Runs that have not finished, with their reasons; None where there are none."""
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


def runs_without_loss(study: ReportedStudy) -> Section | None:
    """Finished runs that every mean and fit of the loss leaves out; None where there are none."""
    rows = [row for row in study.finished if not has_loss(row)]
    if not rows:
        return None
    lines = []
    for row in rows:
        finite = [r for r in row.records if math.isfinite(r.get("val/loss", math.nan))]
        last = "none" if row.final_val_loss is None else f"{row.final_val_loss}"
        lines.append([row.name, last, _whole(finite[-1]["iteration"] if finite else None)])
    return Section(
        "Finished runs without a finite validation loss",
        [
            f"{len(rows)} of {len(study.finished)} finished runs have no finite validation loss at "
            "their end; nan or inf: the run diverged. They enter no mean or fit of the loss; a "
            "mean over the other seeds is then too good. Their throughput and routing do enter, "
            "where finite."
        ],
        tables=[Table(["name", "last val loss", "last finite at iteration"], lines)],
    )


def all_runs(study: ReportedStudy) -> Section:
    """The table of every run, rounded."""
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


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _number(value: float | None, num_decimals: int = 4) -> str:
    return "" if value is None else f"{value:,.{num_decimals}f}"
