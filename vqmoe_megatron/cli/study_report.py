"""``vqmoe study report``: a study's directory becomes a table, plots and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vqmoe_megatron.runtime.optional_packages import require
from vqmoe_megatron.runtime.table_console import table_console


def report(
    study: Annotated[Path, typer.Argument(help="the study's YAML file, or its directory")],
    out: Annotated[
        Path | None, typer.Option(help="folder to write; default: report/ in the study's directory")
    ] = None,
    hardware: Annotated[
        str | None,
        typer.Option(help="profile of the predictions: CPU, H100, ...; default: this machine's"),
    ] = None,
) -> None:
    """Write runs.csv, report.md and a self-contained index.html; works while the study runs.

    Example: vqmoe study report recipes/studies/stdlib_experts.yaml
    """
    require("matplotlib", "vqmoe study report")
    from vqmoe_megatron.study.report.write import write_report

    console = table_console()
    written = write_report(study, out, hardware, console.print)
    rest = [row for row in written.study.rows if not row.is_finished]
    if rest:
        table = Table(title="runs that have not finished")
        for heading in ("name", "state", "iteration", "reason"):
            table.add_column(heading, justify="right" if heading == "iteration" else "left")
        for row in rest:
            iteration = "" if row.iteration is None else f"{row.iteration:,}"
            table.add_row(row.name, row.state, iteration, row.reason or row.planned.reason)
        console.print(table)
    console.print(
        f"{len(written.study.finished)} of {len(written.study.rows)} runs finished; "
        f"page: {written.page}",
        highlight=False,
        soft_wrap=True,
    )
