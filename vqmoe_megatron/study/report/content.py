"""What a report says, in its order: its head, its tables of runs, its plots with their captions.

A caption states what is plotted, what the bars and bands are, and what was not measured.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from vqmoe_megatron.bench.origin import commit_in_words
from vqmoe_megatron.study.report.loss_sections import against_experts, loss_curves
from vqmoe_megatron.study.report.page import Page
from vqmoe_megatron.study.report.plot_style import report_style
from vqmoe_megatron.study.report.run_sections import all_runs, runs_without_loss, unfinished_runs
from vqmoe_megatron.study.report.run_table import ReportedStudy
from vqmoe_megatron.study.report.series import has_loss, split_series
from vqmoe_megatron.study.report.speed_sections import routing, scaling, speed_and_wire

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


def build_page(study: ReportedStudy, origin: dict[str, Any], now: datetime) -> Page:
    """Return the report of ``study``. Draws every plot; no communication."""
    series = split_series(study.rows)
    with report_style():
        sections = [
            unfinished_runs(study),
            runs_without_loss(study),
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
