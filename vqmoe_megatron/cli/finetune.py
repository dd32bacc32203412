"""``vqmoe finetune``: the command, and the table it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vqmoe_megatron.config.finetune import DATASETS, MODES
from vqmoe_megatron.runtime.table_console import table_console
from vqmoe_megatron.runtime.versions import check_versions

if TYPE_CHECKING:  # it imports torch, which a help text can do without
    from vqmoe_megatron.finetune.runs import FinetuneRun, Finetuning


def finetune(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="pretrained run directory, or iter_ folder")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for instance optimizer.lr=3e-4")
    ] = None,
    task: Annotated[str, typer.Option(help=", ".join(DATASETS))] = ...,
    data: Annotated[Path, typer.Option(help="folder with train, dev and test texts")] = ...,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="new folder of the runs, or theirs to go on")
    ] = ...,
    mode: Annotated[str, typer.Option(help=f"of {', '.join(MODES)}; several by commas")] = "full",
    seeds: Annotated[str, typer.Option(help="numbers, by commas")] = "1",
    nproc: Annotated[int | None, typer.Option(min=1, help="local ranks to start")] = None,
) -> None:
    """Train a classification head on labelled texts, with or without what is under it.

    full: everything trains, codes stay. continuous, discrete: one path of the
    layer alone; the other, the router and the combine gate are dropped.
    head: the head alone trains. One run for every mode and seed, each as
    vqmoe pretrain makes it: tracked, resumed by the same command. At the end a
    table: accuracy with 95 % intervals over seeds, parameters, operations.

    Example: vqmoe finetune runs/dual --task sst2 --data data/sst2 --out runs/sst2 --seeds 1,2,3
    """
    check_versions()
    from vqmoe_megatron.finetune.runs import check_finetuning, write_recipes, write_table
    from vqmoe_megatron.finetune.table import table_rows
    from vqmoe_megatron.runtime.world import discover_rank

    variables = discover_rank()
    if variables.world_size != 1:
        raise ValueError(
            f"vqmoe finetune starts its runs itself, but {variables.source} started "
            f"{variables.world_size} ranks; start those of one run with vqmoe pretrain "
            "DIR/recipes/MODE_seed_N.yaml, then the table with vqmoe finetune alone"
        )
    todo = check_finetuning(
        checkpoint,
        task,
        data,
        [name.strip() for name in mode.split(",")],
        _numbers(seeds),
        overrides or [],
        out,
        nproc,
    )
    for note in todo.notes:
        print(note, flush=True)
    write_recipes(todo)
    for run in todo.runs:
        _start(todo, run)
    rows = table_rows(todo)
    path = write_table(todo, rows)
    print_rows(todo, rows)
    print(f"written: {path}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds {text}: write numbers by commas, for instance 1,2,3") from None


def _start(todo: Finetuning, run: FinetuneRun) -> None:
    """Train and test one run, as far as it is not done; end the command where it ends otherwise."""
    from vqmoe_megatron.launch.local_ranks import run_local_ranks

    num_ranks = todo.layout.world_size
    if run.is_done:
        print(f"{run.name}: done before", flush=True)
    else:
        print(f"{run.name}: {run.run_dir}, {num_ranks} rank(s)", flush=True)
        if run.test_scores() is not None:  # its own, of a run whose directory is gone
            run.test_file.unlink()
        ended = run_local_ranks(["pretrain", str(run.recipe)], num_ranks)
        if ended.code:
            print(f"{run.name} ended with {ended.code}; the same command goes on", file=sys.stderr)
            raise typer.Exit(ended.code)
        if not run.is_done:
            raise ValueError(f"{run.run_dir} is not trained to its end; start the command again")
    if todo.has_test and run.test_scores() is None:
        parallel = vars(run.config.parallel)
        layout = [f"parallel.{k}={v}" for k, v in parallel.items() if v is not None]
        arguments = ["evaluate", str(run.run_dir), "--split", "test", "--json", str(run.test_file)]
        ended = run_local_ranks([*arguments, *layout], num_ranks)
        if ended.code:
            raise typer.Exit(ended.code)


def print_rows(todo: Finetuning, rows: list[dict[str, Any]]) -> None:
    """Print the table of all modes."""
    console = table_console(sys.stdout)
    texts = "; ".join(
        f"{name} {split['texts']} texts, {split['padding_share']:.1%} of positions filling, "
        f"{split['cut']} cut, {split['majority_share']:.4f} in the commonest class"
        for name, split in todo.texts.items()
    )
    console.print(texts, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    names = [name for name in ("dev", "test") if name in rows[0]]
    table.add_column("mode")
    for name in (
        *(f"{name} accuracy" for name in names),
        *("trainable", "total", "active per token", "MFLOPs per token", "training"),
    ):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["mode"],
            *(_with_interval(row[name]) for name in names),
            f"{row['trainable_parameters']:,}",
            f"{row['total_parameters']:,}",
            f"{row['active_parameters_per_token']:,}",
            f"{row['forward_flops_per_token'] / 1e6:.3f}",
            f"{row['training_flops_per_token'] / 1e6:.3f}",
        )
    console.print(table)
    for row in rows[1:]:
        apart = ", ".join(
            f"{name} {_with_interval(found, '+')}"
            for name, found in row["minus_first_mode"].items()
        )
        console.print(f"{row['mode']} minus {rows[0]['mode']}, paired by seed: {apart}")


def _with_interval(found: dict[str, Any], sign: str = "") -> str:
    text = f"{found['mean']:{sign}.4f}"
    half = found["half_width_95"]
    return text if half is None else f"{text} +- {half:.4f}"
