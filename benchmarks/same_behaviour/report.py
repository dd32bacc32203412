"""The result as Markdown and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from differences import Difference

ROWS_PER_SCENARIO = 12  # shown in Markdown; JSON has all


def as_json(result: dict[str, Any], rows: list[Difference]) -> str:
    """Return everything, every difference included."""
    return json.dumps({**result, "differences": [asdict(row) for row in rows]}, indent=1) + "\n"


def as_markdown(result: dict[str, Any], rows: list[Difference]) -> str:
    """Return origin, scenarios and differences."""
    machine, versions = result["machine"], result["versions"]
    verdict = f"{len(rows)} differences" if rows else "no difference"
    lines = [
        "# The same behaviour",
        "",
        f"`python benchmarks/same_behaviour`: commit {result['old']} against {result['new']}: "
        f"**{verdict}** in {sum(s['num_compared'] for s in result['scenarios'])} observations of "
        f"{len(result['scenarios'])} scenarios, bit by bit.",
        f"{result['wall_seconds'] / 60:.0f} minutes on {machine['cores']} cores "
        f"({machine['processor']}, Python {machine['python']}, torch {versions['torch']}, "
        f"megatron-core {versions['megatron-core']}).",
        "",
        "| scenario | compared | different | old s | new s |",
        "|---|---|---|---|---|",
    ]
    for scenario in result["scenarios"]:
        seconds = [_seconds(scenario[f"{side}_seconds"]) for side in ("old", "new")]
        lines.append(
            f"| {scenario['name']} | {scenario['num_compared']} | {scenario['num_different']} | "
            f"{seconds[0]} | {seconds[1]} |"
        )
    if rows:
        lines += ["", "## Differences", "", *difference_table(rows)]
    return "\n".join([*lines, ""])


def difference_table(rows: list[Difference]) -> list[str]:
    """Return the Markdown table of differences, the first ones of every scenario."""
    lines = ["| scenario | what | old | new | detail |", "|---|---|---|---|---|"]
    for scenario in dict.fromkeys(row.scenario for row in rows):
        own = [row for row in rows if row.scenario == scenario]
        for row in own[:ROWS_PER_SCENARIO]:
            cells = [row.scenario, row.what, row.old, row.new, row.detail]
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        if len(own) > ROWS_PER_SCENARIO:
            lines.append(f"| {scenario} | and {len(own) - ROWS_PER_SCENARIO} more | | | |")
    return lines


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _seconds(value: float | None) -> str:
    return "kept" if value is None else f"{value:.0f}"
