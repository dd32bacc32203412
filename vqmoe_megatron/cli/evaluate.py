"""``vqmoe evaluate``: loss, bits per byte and perplexity of a checkpoint, or its accuracy."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vqmoe_megatron import __version__
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.own_outputs import is_result_of, refuse_foreign, said_as_refusal
from vqmoe_megatron.runtime.table_console import table_console
from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages
from vqmoe_megatron.runtime.versions import check_versions

if TYPE_CHECKING:  # it imports torch, which a help text can do without
    from vqmoe_megatron.train.evaluate_checkpoint import Evaluation

WRITER = "vqmoe evaluate"


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="run directory, or one iter_ folder")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="parallel.*=value, or train.micro_batch_size=value"),
    ] = None,
    split: Annotated[str, typer.Option(help="valid or test")] = "valid",
    data: Annotated[
        Path | None,
        typer.Option(help="another corpus of the same tokenizer; of a fine-tuned one, other texts"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="tokens between windows; default: their length, no overlap"),
    ] = None,
    max_windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="so many, evenly spread, of a Transformer-XL the first of each row; default: the "
            "whole split",
        ),
    ] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="local ranks to start")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="also write the scores there")
    ] = None,
) -> None:
    """Score a checkpoint on a split, at any layout.

    Prints the window, loss in nats per token, bits per byte and perplexity; of a
    fine-tuned model loss per text and accuracy, of images the same per image.
    Training's own validation reads train.eval_iters * train.global_batch_size
    windows: --max-windows with that number gives its figure. Joins torchrun's or
    srun's world, or starts --nproc ranks.

    Example: vqmoe evaluate runs/quickstart --split test --stride 64
    """
    check_versions()
    from vqmoe_megatron.runtime.world import choose_device, discover_rank
    from vqmoe_megatron.train.evaluate_checkpoint import check_evaluation, evaluate_here

    variables = discover_rank()
    world_size = nproc if variables.source == "single process" else variables.world_size
    asked = check_evaluation(
        checkpoint, overrides or [], split, data, stride, max_windows, world_size
    )
    if json_file is not None and json_file.exists() and not is_result_of(json_file, WRITER):
        refuse_foreign(json_file, WRITER)
    if variables.world_size == 1 and asked.layout.world_size > 1:
        from vqmoe_megatron.launch.local_ranks import run_local_ranks

        ended = run_local_ranks(sys.argv[1:], asked.layout.world_size)
        raise typer.Exit(ended.code)
    quiet_known_messages()
    device, _ = choose_device(asked.config.train.device)
    windows, scores = evaluate_here(asked, variables, device)
    if variables.rank == 0:
        _show(asked, windows, scores)
        if json_file is not None:
            content = _record(asked, windows, scores)
            with said_as_refusal(json_file):
                json_file.parent.mkdir(parents=True, exist_ok=True)
                replace_file(json_file, json.dumps(content, indent=2) + "\n")


def _record(asked: Evaluation, windows: str, scores: dict[str, float]) -> dict[str, object]:
    return {
        "command": WRITER,
        "written_by": f"vqmoe_megatron {__version__}",
        "checkpoint": str(asked.folder),
        "iteration": asked.iteration,
        "data": asked.config.finetune.path or asked.config.data.path,
        "split": asked.config.data.eval_split,
        "windows": windows,
        "ranks": asked.layout.world_size,
        "scores": scores,
    }


def _show(asked: Evaluation, windows: str, scores: dict[str, float]) -> None:
    console = table_console(sys.stdout)
    section = asked.config.data
    where = asked.config.finetune.path or section.path
    console.print(f"{asked.folder}, split {section.eval_split} of {where}", soft_wrap=True)
    console.print(windows, soft_wrap=True)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for name in scores:
        table.add_column(name.removeprefix("val/"), justify="right")
    table.add_row(*(f"{value:.6f}" for value in scores.values()))
    console.print(table)
