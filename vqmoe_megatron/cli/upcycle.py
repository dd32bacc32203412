"""``vqmoe upcycle``: the command, and the table it prints."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.runtime.table_console import table_console
from vqmoe_megatron.runtime.versions import check_versions

if TYPE_CHECKING:  # it imports torch, which a help text can do without
    from vqmoe_megatron.upcycle.upcycle import Upcycled


def upcycle(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="run directory, folder that Megatron saved into (torch_dist), or one iter_ folder",
        ),
    ],
    recipe: Annotated[Path, typer.Argument(help="YAML recipe of the model that it becomes")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for instance optimizer.lr=1e-3")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="RUN_DIR", help="new run directory; takes train.output_dir's place"),
    ] = ...,
) -> None:
    """Start a VQMoE from a trained dense or mixture-of-experts model.

    Experts and all else are copied; of a dense model every expert is its MLP.
    A code memory, or a codebook's path (vq.path=dual with vq.combine=sigmoid,
    vq.path=filled with vq.fill_values=direct), starts silent, codes by k-means
    on the recipe's text. The losses of both are compared, and only an equal
    model is written. One process; training then goes on at any layout.

    Example: vqmoe upcycle runs/smoe recipes/quickstart.yaml --out runs/upcycled
    """
    check_versions()
    from vqmoe_megatron.upcycle import upcycle as upcycled

    allowed = upcycled.check_upcycling(source, load_recipe(recipe, overrides or []), out)
    for note in allowed.notes:
        print(note, flush=True)
    print_upcycled(upcycled.upcycle(allowed), sys.stdout)


def print_upcycled(done: Upcycled, stream: TextIO) -> None:
    """Print both losses and the command that goes on."""
    console = table_console(stream)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    table.add_column("model")
    names = [name for name in done.scores if name in done.source_scores]
    for name in names:
        table.add_column(name, justify="right")
    for model, scores in (("source", done.source_scores), ("upcycled", done.scores)):
        table.add_row(model, *(f"{scores[name]:.8f}" for name in names))
    apart = (f"{done.scores[name] - done.source_scores[name]:+.1e}" for name in names)
    table.add_row("difference", *apart)
    console.print(f"validation: {done.windows}", soft_wrap=True)
    console.print(table)
    dense = ""
    if done.dense_layers:
        dense = f"; the dense MLP of {done.dense_layers} layers became every expert of its layer"
        if done.output_scale != 1.0:
            dense += f", outputs times {done.output_scale:g}"
    console.print(
        f"{done.run_dir}: checkpoint 0, {done.num_copied_tensors} tensors of {done.source} "
        f"({done.source_kind}){dense}",
        soft_wrap=True,
    )
    for name, number in done.sampled_tokens.items():
        console.print(f"{name}: k-means of {number:,} tokens", soft_wrap=True)
    recipe = shlex.quote(str(done.run_dir / CONFIG_FILE))
    console.print(f"train it: vqmoe pretrain {recipe} --nproc {done.num_ranks}", soft_wrap=True)
