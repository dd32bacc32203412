"""From a checkpoint to a folder of tables, in one process.

1. The checkpoint is found and judged by its files alone: complete, ours, and with a table to write
   or a code memory.
2. This process becomes a world of one rank.
3. Layer by layer: load, evaluate every code row once, write; of a code memory the rows of layers
   that carry it, and once for the model the codes of tokens. With path=continuous that is all.
4. The folder gets its index and its name.

Megatron is imported in 2 and later, after the CPU has been made fit for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vqmoe_megatron import __version__, registry
from vqmoe_megatron.checkpoint.inspection import CheckpointContents, inspect_checkpoint
from vqmoe_megatron.checkpoint.table_folder import (
    TableFile,
    write_index,
    write_table,
    write_tensors,
)
from vqmoe_megatron.config import (
    CodeMemoryConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    VQConfig,
)
from vqmoe_megatron.config.recipe import load_saved_recipe
from vqmoe_megatron.config.router_rules import other_router
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.rundir.own_outputs import check_new_folder, new_folder
from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages
from vqmoe_megatron.runtime.world import (
    build_process_groups,
    choose_device,
    discover_rank,
    join_world,
    leave_world,
)
from vqmoe_megatron.vq.codebook import Codebook
from vqmoe_megatron.vq.memory_tables import CODES_FILE
from vqmoe_megatron.vq.table_layer import TABLE_FORMAT_VERSION


@dataclass(frozen=True)
class ExportedLayer:
    """One layer of the index."""

    layer: int  # from 1, over the whole model
    file: TableFile | None  # of its discrete path; None without one
    num_rows: int  # C * K in it
    expert_bytes: int  # of the layer's expert parameters, in the dtype they have
    replaced_expert_bytes: int  # of them, what inference with the table does without
    memory: TableFile | None  # rows of its code memory
    num_memory_rows: int  # in it


@dataclass(frozen=True)
class Export:
    """What was written."""

    out: Path
    checkpoint: str
    iteration: int
    path: str  # discrete, dual, or continuous beside a code memory
    layers: list[ExportedLayer]
    codes: TableFile | None  # by which a code memory finds rows; None without one

    @property
    def files(self) -> list[TableFile]:
        """All of them."""
        of_layers = [part for layer in self.layers for part in (layer.file, layer.memory)]
        return [file for file in (*of_layers, self.codes) if file is not None]


def export_tables(checkpoint: Path, out: Path) -> Export:
    """Write the tables of a checkpoint into the new folder ``out``.

    Args:
        checkpoint: a run directory, its checkpoints folder, or one iter_ folder; of any layout.
        out: not there yet, or empty.

    Makes this process a world of one rank and ends it again.

    Raises:
        ValueError: when there is no usable checkpoint, it has no table, ``out`` is not new, or this
            is one of several ranks.
    """
    contents = inspect_checkpoint(checkpoint)
    config = load_saved_recipe(Path(contents.folder) / CONFIG_FILE)
    check_has_table(config.vq, config.code_memory)
    refuse_shared_expert(config.model)
    advice = "export a run with topk"
    if (problem := other_router(config, "an export of tables", advice)) is not None:
        raise ValueError(problem)
    check_new_folder(out)
    with world_of_one(config) as layout, new_folder(out) as partial:
        return write_tables(contents, config, layout, partial, out)


def check_has_table(vq: VQConfig, memory: CodeMemoryConfig) -> None:
    """Raise ``ValueError`` for a layer whose discrete path is no function of the codes, and for one
    that has neither such a path nor a code memory."""
    if vq.path == "continuous":
        if memory.is_on:
            return
        raise ValueError(
            "vq.path=continuous has no discrete path, so there is no table to export; tables exist "
            "for path=discrete and path=dual, and of a code memory"
        )
    if vq.path == "filled":
        raise ValueError(
            "vq.path=filled has no table to export: a token's output is not a function of its code "
            "alone, since the router weighs rows of many experts and some see the token itself; "
            "tables exist for path=discrete and path=dual"
        )
    if vq.expert_input != "code":
        raise ValueError(
            f"vq.expert_input={vq.expert_input} has no table to export: every token has an expert "
            "input of its own, so no finite table holds the outputs; tables exist for "
            "expert_input=code, where an output depends on the code alone"
        )
    quantizer = registry.load("quantizer", vq.quantizer)
    if quantizer.search is not Codebook.search and not quantizer.search_is_nearest:
        raise ValueError(
            f"vq.quantizer={vq.quantizer} has a search of its own, which an exported table "
            "lacks: that takes the nearest of code_vectors(); tables exist for quantizers that "
            "search as Codebook.search does"
        )


def refuse_shared_expert(model: ModelConfig) -> None:
    """Raise ``ValueError`` for a summand of the layer that no table holds."""
    if (size := model.moe_shared_expert_intermediate_size) is not None:
        raise ValueError(
            f"model.moe_shared_expert_intermediate_size={size} has no table to export: every token "
            "has an output of its own from the shared expert, which a file of tables lacks; tables "
            "exist for layers without one"
        )


def write_tables(
    contents: CheckpointContents,
    config: RunConfig,
    layout: ParallelLayout,
    partial: Path,
    out: Path,
) -> Export:
    """Write all layers' files and the index into ``partial``, in a world of one rank."""
    from vqmoe_megatron.checkpoint.layer_table import layer_table
    from vqmoe_megatron.checkpoint.memory_table import memory_codes, memory_rows
    from vqmoe_megatron.checkpoint.stored_layers import stored_layers, stored_stream

    layers, codes = [], None
    folder, names = Path(contents.folder), [tensor.name for tensor in contents.tensors]
    if (stream := stored_stream(folder, config, layout, names)) is not None:
        tensors, of_codes = memory_codes(stream, contents.iteration)
        codes = write_tensors(partial / CODES_FILE, tensors, of_codes.as_metadata())
    for layer in stored_layers(folder, config, layout, names):
        memory, rows = None, {}
        if (of_memory := memory_rows(layer, contents.iteration)) is not None:
            rows, of_rows = of_memory
            path = partial / f"memory_{layer.layer_number:04d}.safetensors"
            memory = write_tensors(path, rows, of_rows.as_metadata())
        file, num_rows = None, 0
        if config.vq.path != "continuous":
            tensors, settings = layer_table(layer, contents.iteration)
            file = write_table(partial, layer.layer_number, tensors, settings.as_metadata())
            num_rows = tensors["table"].shape[0]
        expert_bytes = sum(p.numel() * p.element_size() for p in layer.experts.parameters())
        is_replaced = config.vq.path == "discrete"
        layers.append(
            ExportedLayer(
                layer=layer.layer_number,
                file=file,
                num_rows=num_rows,
                expert_bytes=expert_bytes,
                replaced_expert_bytes=expert_bytes if is_replaced else 0,
                memory=memory,
                num_memory_rows=rows["rows"].shape[0] if memory else 0,
            )
        )
    export = Export(out, contents.folder, contents.iteration, config.vq.path, layers, codes)
    write_index(partial, _index(export, contents, config))
    return export


def _index(export: Export, contents: CheckpointContents, config: RunConfig) -> dict[str, Any]:
    return {
        "format_version": TABLE_FORMAT_VERSION,
        "written_by": f"vqmoe_megatron {__version__}",
        "checkpoint": {
            "folder": contents.folder,
            "iteration": contents.iteration,
            "recipe_sha256": contents.recipe_sha256,
        },
        "model": contents.model,
        "vq": asdict(config.vq),
        "code_memory": asdict(config.code_memory),
        "code_memory_file": None if export.codes is None else asdict(export.codes),
        "total_bytes": sum(file.num_bytes for file in export.files),
        "replaced_expert_bytes": sum(layer.replaced_expert_bytes for layer in export.layers),
        "layers": [
            {"layer": layer.layer}
            | _of_table(layer.file)
            | {"num_rows": layer.num_rows, "expert_bytes": layer.expert_bytes}
            | {"replaced_expert_bytes": layer.replaced_expert_bytes}
            | {"code_memory_file": None if layer.memory is None else asdict(layer.memory)}
            for layer in export.layers
        ],
    }


def _of_table(file: TableFile | None) -> dict[str, Any]:
    if file is None:
        return {"file": None, "sha256": None, "num_bytes": 0, "tensors": {}}
    tensors = {name: asdict(part) for name, part in file.tensors.items()}
    return {"file": file.name, "sha256": file.sha256, "num_bytes": file.num_bytes} | {
        "tensors": tensors
    }


@contextlib.contextmanager
def world_of_one(
    config: RunConfig,
    command: str = "export",
    say: Callable[[str], None] = print,
) -> Iterator[ParallelLayout]:
    """Stand up the process groups of one rank, and end them; yields their layout.

    ``say`` is told where ``command`` of vqmoe runs.

    Raises:
        ValueError: where this is one of several ranks.
    """
    variables = discover_rank()
    if variables.world_size != 1:
        raise ValueError(
            f"vqmoe {command} runs in one process, but {variables.source} started "
            f"{variables.world_size} ranks; start it without {variables.source}"
        )
    device, reason = choose_device("auto")
    say(f"{command.removesuffix('e')}ing on {device} ({reason})")
    quiet_known_messages()
    if device == "cpu":
        from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat

        install_cpu_compat()
    layout = ParallelLayout.from_config(replace(config, parallel=ParallelConfig()), 1)
    join_world(variables, device)
    try:
        build_process_groups(layout)
        yield layout
    finally:
        leave_world()
