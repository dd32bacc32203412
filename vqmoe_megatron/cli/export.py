"""``vqmoe export``: the command, and the table it prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vqmoe_megatron.runtime.table_console import table_console
from vqmoe_megatron.runtime.versions import check_versions

if TYPE_CHECKING:  # it imports torch, which a help text can do without
    from vqmoe_megatron.checkpoint.table_export import Export
    from vqmoe_megatron.hf.export import HfExport


def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="run directory, its checkpoints folder, or one iter_ folder; of any layout",
        ),
    ],
    hf: Annotated[
        Path | None,
        typer.Option(metavar="OUT_DIR", help="new directory for a Hugging Face model"),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option(metavar="OUT_DIR", help="new directory for the layers' tables"),
    ] = None,
    max_shard_bytes: Annotated[
        int, typer.Option(min=1, help="of one file of a Hugging Face model")
    ] = 4_000_000_000,
) -> None:
    """Write a checkpoint as a Hugging Face model, or its layers as tables.

    --hf: a whole model for AutoModelForCausalLM.from_pretrained(OUT_DIR,
    trust_remote_code=True), which needs torch and transformers 5 alone, and
    what vqmoe import needs besides.
    --tables: each VQMoE layer's discrete path as a table, and a code memory.
    A table needs vq.expert_input=code and vq.path=discrete or dual; beside
    path=continuous the memory is all. In Python, load_table_layer of
    vqmoe_megatron.vq.table_layer reads a file back, without Megatron, and
    load_code_memory of vqmoe_megatron.vq.memory_tables a code memory.
    One process; one layer at a time.

    Example: vqmoe export runs/quickstart --hf exports/quickstart
    """
    check_versions()
    if (hf is None) == (tables is None):
        raise typer.BadParameter("name one of --hf OUT_DIR and --tables OUT_DIR")
    if hf is not None:
        from vqmoe_megatron.hf.export import export_hf

        print_hf_export(export_hf(checkpoint, hf, max_shard_bytes), sys.stdout)
        return
    from vqmoe_megatron.checkpoint.table_export import export_tables

    print_export(export_tables(checkpoint, tables), sys.stdout)


def print_hf_export(written: HfExport, stream: TextIO) -> None:
    """Print what was written, and how it is read."""
    console = table_console(stream)
    console.print(
        f"{written.out}: {len(written.files)} files of {written.checkpoint} (iteration "
        f"{written.iteration:,}), {written.num_parameters:,} values, {written.total_bytes:,} bytes",
        soft_wrap=True,
    )
    console.print(
        f"for vqmoe import: {written.training_bytes:,} bytes that only training needs, the recipe "
        "and the corpus' description",
        soft_wrap=True,
    )
    if written.no_tokenizer:
        console.print(f"without a tokenizer: {written.no_tokenizer}", soft_wrap=True)
    console.print(
        f"AutoModelForCausalLM.from_pretrained({str(written.out)!r}, trust_remote_code=True)",
        soft_wrap=True,
        highlight=False,
    )


def print_export(written: Export, stream: TextIO) -> None:
    """Print one line per layer. A terminal gets a ruled table; anything else plain columns."""
    console = table_console(stream)
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    table.add_column("file")
    for name in ("layer", "rows", "bytes", "expert bytes", "of them replaced"):
        table.add_column(name, justify="right")
    for layer in written.layers:
        if layer.file is not None:
            sizes = (layer.num_rows, layer.file.num_bytes, layer.expert_bytes)
            row = (layer.layer, *sizes, layer.replaced_expert_bytes)
            table.add_row(layer.file.name, *(f"{value:,}" for value in row))
        if layer.memory is not None:
            sizes = (layer.layer, layer.num_memory_rows, layer.memory.num_bytes)
            table.add_row(layer.memory.name, *(f"{value:,}" for value in sizes))
    if written.codes is not None:
        table.add_row(written.codes.name, "", "", f"{written.codes.num_bytes:,}")
    console.print(table)
    total_bytes = sum(file.num_bytes for file in written.files)
    replaced_bytes = sum(layer.replaced_expert_bytes for layer in written.layers)
    in_place_of = f" in place of {replaced_bytes:,} bytes of experts" if replaced_bytes else ""
    console.print(
        f"{written.out}: {len(written.files)} files of {written.checkpoint} (iteration "
        f"{written.iteration:,}), {total_bytes:,} bytes{in_place_of}",
        soft_wrap=True,
    )
    if written.path == "dual":
        console.print(
            "path=dual: the continuous path keeps its experts at inference; the tables spare the "
            "discrete path's work, no memory",
            soft_wrap=True,
        )
