"""The pages of commands and of metrics: the command line's own help, and the metric table."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from vqmoe_megatron import cli
from vqmoe_megatron.metrics.metric import LayerMetric
from vqmoe_megatron.metrics.table import OUR_METRICS

COMMANDS = """\
# Commands

What `vqmoe COMMAND --help` says, written out when this site is built. Every command ends with 0
when it is done, 2 when it refuses what was asked for, and 1 when it crashes; `vqmoe pretrain`
and `vqmoe finetune` end with 75 when a run has saved on request and wants to be started again
([Operations](../operations.md)).
"""
METRICS = """\
# Metrics

Every number of `metrics.jsonl`, from the table that all writers and readers use
(`vqmoe_megatron/metrics/table.py`). A metric of layers exists twice: over all layers under the
name below, and per layer as `vq/layer_03/dead_codes` (layers count from 1). "DP" are the ranks that
saw different tokens.

| metric | unit | what it is | reduction |
|---|---|---|---|
"""


def walk(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Every command of the user's, with its words."""
    for name, below in getattr(command, "commands", {}).items():
        if hasattr(below, "commands"):
            yield from walk(below, (*words, name))
        elif not below.hidden:
            yield " ".join((*words, name)), below


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _row(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name.upper()]
    default = parameter.default
    is_said = default not in (None, False, ()) and not callable(default)
    cells = (
        ", ".join(f"`{name}`" for name in names),
        "required" if parameter.required else f"`{default}`" if is_said else "",
        getattr(parameter, "help", None) or "",
    )
    return "| " + " | ".join(map(_cell, cells)) + " |"


def command_page() -> str:
    """All commands with their options, in Markdown."""
    parts = [COMMANDS]
    for name, command in walk(typer.main.get_command(cli.app), ("vqmoe",)):
        said, _, rest = inspect.cleandoc(command.help or "").partition("Example: ")
        example, _, more = rest.partition("\n\n")
        said = f"{said.strip()}\n\n{more.strip()}"
        parts.append(f"\n## {name}\n\n{said.strip()}\n")
        if example:
            parts.append(f"\n```bash\n{' '.join(example.split())}\n```\n")
        rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            parts.append("\n| argument, option | default | what it does |\n|---|---|---|\n")
            parts.append("\n".join(rows) + "\n")
    return "".join(parts)


def metric_page() -> str:
    """The metric table, in Markdown."""
    rows = []
    for row in OUR_METRICS:
        reduction = row.reduction
        if isinstance(row, LayerMetric):
            steps = "; summed over the steps since the last log" * (row.over_steps == "sum")
            reduction = f"{reduction} over layers{steps}"
        unit = "" if row.unit == "1" else row.unit
        cells = (f"`{row.name}`", unit, row.description, reduction)
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    return METRICS + "\n".join(rows) + "\n"
