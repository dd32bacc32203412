"""``vqmoe mlflow-sync``: the command, and the table it prints."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vqmoe_megatron.config import TrackingConfig
from vqmoe_megatron.runtime.optional_packages import require
from vqmoe_megatron.runtime.table_console import table_console

if TYPE_CHECKING:
    from vqmoe_megatron.track.mlflow.sync import SyncResult

COUNTS = ("points", "there", "sent", "differ", "only there", "params", "tags", "files")
REQUEST_TIMEOUT_S = "60"  # nobody trains meanwhile, and a long history takes its time


def mlflow_sync(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR...", help="one or more run directories")
    ],
    uri: Annotated[
        str | None,
        typer.Option(help="another store than the run's own, for instance http://host:5000"),
    ] = None,
) -> None:
    """Send to MLflow what a run could not: metrics, params, tags, plots, final status.

    Asks the store what it has and sends the rest, so it may be repeated. A run
    that is training now ships by itself and is left alone. Credentials come
    from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.

    The table counts values of the run's logs: points, all of them; there, in
    the store before; sent, now; differ, there with another value; only there,
    in the store but in no log any more. Then params, tags and files sent now.

    A database that another process has locked is waited for, 60 s at most.

    Exits: 0 all is there, 1 a directory is damaged or its store could not be
    reached or refused (the others were still sent), 2 usage.

    Example: vqmoe mlflow-sync runs/quickstart --uri http://127.0.0.1:5000
    """
    TrackingConfig(mlflow_uri=uri)  # refuses a password in the address
    require("mlflow", "vqmoe mlflow-sync")
    from vqmoe_megatron.track.mlflow.errors import MlflowUnavailable
    from vqmoe_megatron.track.mlflow.sync import check_run_directory, sync_run

    for run_dir in run_dirs:
        if not run_dir.is_dir():  # mistyped; what is there but damaged must not stop the others
            check_run_directory(run_dir)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", REQUEST_TIMEOUT_S)
    results: list[SyncResult] = []
    failures: dict[Path, str] = {}
    for run_dir in run_dirs:
        try:
            results.append(sync_run(run_dir, uri))
        except (MlflowUnavailable, ValueError, OSError) as error:
            print(f"error: {run_dir}: {error}", file=sys.stderr)
            failures[run_dir] = str(error).partition("\n")[0]
    print_results(results, failures, sys.stdout)
    if failures:
        raise typer.Exit(1)


def print_results(results: list[SyncResult], failures: Mapping[Path, str], stream: TextIO) -> None:
    """Print one line per run, then one per failure: the directory and the reason.

    A terminal gets a ruled table; anything else plain columns.
    """
    console = table_console(stream)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    table.add_column("run directory", overflow="fold")
    table.add_column("MLflow run", overflow="fold")
    for name in COUNTS:
        table.add_column(name, justify="right")
    table.add_column("status", overflow="fold")
    for result in results:
        counts = (
            result.num_points,
            result.num_there,
            result.num_sent,
            result.num_differing,
            result.num_only_there,
            result.num_params_sent,
            result.num_tags_sent,
            result.num_files_sent,
        )
        cells = ["-"] * len(COUNTS) if result.is_running else [f"{count:,}" for count in counts]
        status = "training now, left alone" if result.is_running else result.status
        table.add_row(str(result.run_dir), result.run_id or "-", *cells, status)
    for run_dir, reason in failures.items():
        table.add_row(str(run_dir), "-", *["-"] * len(COUNTS), f"failed: {reason}")
    console.print(table)
    if any(result.num_differing or result.num_only_there for result in results):
        console.print(
            "differ, only there: iterations that were trained twice or given up; MLflow cannot "
            "take a point back, metrics.jsonl holds what counts",
            soft_wrap=True,
        )
