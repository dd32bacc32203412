"""What a report says: its head, then its sections in order; here those that are tables of runs."""

from __future__ import annotations

import math
from collections import Counter
from datetime import datetime, timezone
from typing import Any

from vqmoe_megatron.bench.origin import commit_in_words
from vqmoe_megatron.study.report.page import Page, Section, Table
from vqmoe_megatron.study.report.paired_section import against_baselines
from vqmoe_megatron.study.report.plot_sections import (
    against_experts,
    loss_curves,
    routing,
    scaling,
    speed_and_wire,
)
from vqmoe_megatron.study.report.plot_style import report_style
from vqmoe_megatron.study.report.run_table import COLUMNS, ReportedStudy
from vqmoe_megatron.study.report.series import has_loss, split_series

RULES = {
    "equal_tokens": "equal tokens: every run reads the same number of training tokens",
    "equal_flops": "equal FLOPs: every run gets the same number of training operations",
    "as_written": "as written: the recipe and the grid set the length of every run",
}
PLOT_NAMES = (
    "arm_differences.png",
    "arm_bits_per_byte.png",
    "loss_experts.png",
    "loss_tokens.png",
    "loss_flops.png",
    "tokens_per_second.png",
    "wire_bytes.png",
    "routing.png",
    "scaling.png",
)


WHOLE, FOUR, TWO = "{:,.0f}", "{:,.4f}", "{:,.2f}"
SHOWN = {  # of runs.csv in the table of all runs, by its heading there
    "name": ("name", "{}"),
    "state": ("state", "{}"),
    "val loss": ("final_val_loss", FOUR),
    "bits/byte": ("final_bits_per_byte", FOUR),
    "tokens": ("num_tokens", WHOLE),
    "FLOPs": ("num_flops", "{:.2e}"),
    "parameters": ("num_parameters_total", WHOLE),
    "active": ("num_parameters_active", WHOLE),
    "tokens/s": ("tokens_per_second", WHOLE),
    "wire bytes": ("wire_bytes_per_rank_and_step", WHOLE),
    "imbalance": ("expert_load_imbalance", TWO),
    "perplexity": ("code_perplexity", TWO),
    "dead": ("dead_codes", TWO),
}


def build_page(study: ReportedStudy, origin: dict[str, Any], now: datetime) -> Page:
    """Return the report of ``study``. Draws every plot; no communication."""
    series = split_series(study.rows)
    with report_style():
        sections = [
            unfinished_runs(study),
            runs_without_loss(study),
            against_baselines(study, series),
            against_experts(series),
            loss_curves(series),
            speed_and_wire(study, series),
            routing(series),
            scaling(study),
            all_runs(study),
        ]
    return Page(f"Study {study.name}", _facts(study, origin, now), [s for s in sections if s])


def _facts(study: ReportedStudy, origin: dict[str, Any], now: datetime) -> list[tuple[str, str]]:
    machine, versions = origin["machine"], origin["versions"]
    finished = study.finished
    num_lost = sum(not has_loss(row) for row in finished)
    lost = f" ({num_lost} of them without a finite validation loss)" if num_lost else ""
    ranks = sorted({row.num_ranks for row in study.rows})
    return [
        ("Study", study.name),
        ("Rule", RULES.get(study.rule, study.rule)),
        ("Runs", f"{len(finished)} finished{lost}, {len(study.rows) - len(finished)} not"),
        ("Ranks per run", ", ".join(map(str, ranks))),
        ("Report made", now.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")),
        ("By commit", commit_in_words(origin)),
        (
            "On machine",
            f"{machine['cores']} cores ({machine['processor']}), "
            f"{machine['memory_bytes'] / 2**30:.0f} GiB, GPU: {machine['gpu'] or 'none'}, Python "
            f"{machine['python']}, torch {versions['torch']}, megatron-core "
            f"{versions['megatron-core']}",
        ),
    ]


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
            form.format(value) if (value := COLUMNS[column](row)) is not None else ""
            for column, form in SHOWN.values()
        ]
        for row in study.rows
    ]
    caption = (
        "runs.csv holds these figures unrounded, the axes, and more. Parameters, FLOPs and wire "
        "bytes (of the busiest rank, per step) are planned, the rest is measured."
    )
    return Section("All runs", tables=[Table(list(SHOWN), lines, caption)])


def _whole(value: float | None) -> str:
    return "" if value is None else WHOLE.format(value)
