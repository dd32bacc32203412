"""``vqmoe checkpoint``: commands that look into checkpoints, and the tables they print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from vqmoe_megatron.runtime.table_console import table_console

if TYPE_CHECKING:  # it imports torch, which a help text can do without
    from vqmoe_megatron.checkpoint.inspection import CheckpointContents, FolderSize

LAYOUT_SIZES = (
    ("TP", "tensor_model_parallel_size"),
    ("PP", "pipeline_model_parallel_size"),
    ("VPP", "virtual_pipeline_model_parallel_size"),
    ("CP", "context_parallel_size"),
    ("EP", "expert_model_parallel_size"),
    ("ETP", "expert_tensor_parallel_size"),
    ("DP", "data_parallel_size"),
)
NOT_PLAIN = "unknown: common.pt holds more than plain values and was not read"

checkpoint_app = typer.Typer(no_args_is_help=True, help="Look into checkpoints.")


@checkpoint_app.callback()
def _checkpoint() -> None:
    """Look into checkpoints."""


@checkpoint_app.command()
def inspect(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="run directory, its checkpoints folder, or one iter_ folder"
        ),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="list every tensor")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what is in a checkpoint, which layout wrote it, and what takes how many bytes.

    Every file is read once and compared with its checksum. No ranks, no GPU.

    Example: vqmoe checkpoint inspect runs/quickstart --tensors
    """
    from vqmoe_megatron.checkpoint.inspection import as_json as json_text
    from vqmoe_megatron.checkpoint.inspection import inspect_checkpoint

    contents = inspect_checkpoint(directory)
    if as_json:
        print(json_text(contents, with_tensors=tensors))
    else:
        print_contents(contents, with_tensors=tensors, stream=sys.stdout)


def print_contents(contents: CheckpointContents, with_tensors: bool, stream: TextIO) -> None:
    """Print the summary, the bytes by group and, when asked for, every tensor.

    A terminal gets ruled tables; anything else plain columns.
    """
    console = table_console(stream)
    box = SIMPLE_HEAD if console.is_terminal else None
    tables = [_summary(contents), _bytes_by_group(contents)]
    if with_tensors:
        tables.append(_all_tensors(contents))
    for table in tables:
        table.box = box
        console.print(table)
        console.print()


def _table(*columns: str, numbers: tuple[str, ...] = (), show_header: bool = True) -> Table:
    table = Table(show_header=show_header, pad_edge=False)
    for column in columns:
        is_number = column in numbers
        table.add_column(
            column,
            justify="right" if is_number else "left",
            no_wrap=is_number,
            overflow="fold",
        )
    return table


def _summary(contents: CheckpointContents) -> Table:
    table = _table("what", "value", show_header=False)
    model, vq, layout = contents.model, contents.vq, contents.layout
    sizes = " ".join(f"{short} {layout[name] or 1}" for short, name in LAYOUT_SIZES)
    version = contents.format_version
    for row in (
        ("checkpoint", contents.folder),
        ("iteration", f"{contents.iteration:,}"),
        ("progress", _progress(contents)),
        ("format version", NOT_PLAIN if version is None else version),
        (
            "model",
            f"{model['num_layers']} layers, hidden {model['hidden_size']}, "
            f"{model['num_moe_experts']} experts (top {model['moe_router_topk']}), "
            f"{_codes_in_words(vq)}, path {vq['path']}, vocabulary {model['vocab_size']}",
        ),
        ("code memory", contents.code_memory),
        ("written by", f"{sizes}, world size {layout['world_size']}"),
        ("corpus", f"{contents.corpus}, tokenizer {contents.tokenizer.get('kind', 'unknown')}"),
        ("recipe", f"sha256 {contents.recipe_sha256[:12]} of run_config.yaml"),
        ("parameters", f"{contents.num_parameters:,}"),
        ("checksums", _checksums(contents)),
        ("complete here", _folders(contents.checkpoints)),
        ("unfinished saves", _folders(contents.incomplete)),
    ):
        table.add_row(*map(str, row))
    return table


def _codes_in_words(vq: dict[str, Any]) -> str:
    if vq["path"] == "continuous":
        return "layers without codes"
    slices = f"{vq['num_code_slices']} slice{'s' if vq['num_code_slices'] != 1 else ''}"
    kinds = f"{vq['quantizer']}, {vq['code_map']}, {vq['codebook_update']}"
    return f"{vq['num_codes']} codes x {slices} ({kinds})"


def _progress(contents: CheckpointContents) -> str:
    if not contents.progress:
        return NOT_PLAIN
    return ", ".join(f"{name} {value}" for name, value in contents.progress.items())


def _checksums(contents: CheckpointContents) -> str:
    if contents.num_verified_files is None:
        return "no checksums, written before 0.5: presence and length of files are verified"
    return f"all {contents.num_verified_files} files are as they were written"


def _folders(folders: list[FolderSize]) -> str:
    listed = [f"{folder.name} ({folder.disk_bytes:,} bytes)" for folder in folders]
    return "\n".join(listed) or "none"


def _bytes_by_group(contents: CheckpointContents) -> Table:
    numbers = ("tensors", "parameters", "bytes", "share")
    table = _table("group", *numbers, "dtype", numbers=numbers)
    for group in contents.groups:
        table.add_row(
            group.name,
            f"{group.num_tensors:,}",
            f"{group.num_parameters:,}" if group.num_parameters else "",
            f"{group.num_bytes:,}",
            f"{group.num_bytes / contents.tensor_bytes:.1%}",
            ", ".join(group.dtypes),
        )
    table.add_row(
        "all tensors",
        f"{contents.num_tensors:,}",
        f"{contents.num_parameters:,}",
        f"{contents.tensor_bytes:,}",
        "100.0%",
    )
    table.add_row(
        f"{contents.num_objects:,} objects that are no tensors",
        "",
        "",
        f"{contents.object_bytes:,}",
    )
    packaging = contents.disk_bytes - contents.tensor_bytes - contents.object_bytes
    table.add_row(
        f"index, descriptions and packaging of {contents.num_pieces:,} pieces",
        "",
        "",
        f"{packaging:,}",
    )
    table.add_row("on disk", "", "", f"{contents.disk_bytes:,}")
    return table


def _all_tensors(contents: CheckpointContents) -> Table:
    numbers = ("bytes", "pieces")
    table = _table("tensor", "shape", "dtype", *numbers, numbers=numbers)
    for tensor in contents.tensors:
        shape = f"[{', '.join(map(str, tensor.shape))}]"
        table.add_row(
            tensor.name, shape, tensor.dtype, f"{tensor.num_bytes:,}", f"{tensor.num_pieces:,}"
        )
    return table
