"""``vqmoe export RUN_DIR --hf DIR``: a folder that ``AutoModelForCausalLM`` loads.

One process, one layer at a time, from a checkpoint of any layout. The folder is complete or not
there. Beside the model it holds what ``vqmoe import`` needs besides (``training_files``).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.checkpoint.content import check_format_version, read_content
from vqmoe_megatron.checkpoint.inspection import CheckpointContents, inspect_checkpoint
from vqmoe_megatron.checkpoint.table_export import world_of_one
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_saved_recipe
from vqmoe_megatron.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from vqmoe_megatron.hf.hf_config import MODEL_FILE, hf_config
from vqmoe_megatron.hf.model_card import model_card
from vqmoe_megatron.hf.rules import check_has_hf_form
from vqmoe_megatron.hf.shards import MAX_SHARD_BYTES, Shards
from vqmoe_megatron.hf.tokenizer_files import write_tokenizer
from vqmoe_megatron.hf.training_files import TRAINING_STEM, write_training
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.rundir.own_outputs import check_new_folder, new_folder


@dataclass(frozen=True)
class HfExport:
    """What was written."""

    out: Path
    checkpoint: str
    iteration: int
    num_parameters: int  # tables and rows counted
    total_bytes: int  # of the tensors
    training_bytes: int  # of those that only training needs
    files: list[str]
    no_tokenizer: str  # why there is none; empty where there is one


def export_hf(checkpoint: Path, out: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> HfExport:
    """Write a checkpoint as a Hugging Face model into the new folder ``out``.

    Args:
        checkpoint: a run directory, its checkpoints folder, or one iter_ folder; of any layout.
        out: not there yet, or empty.
        max_shard_bytes: of one file of tensors.

    Makes this process a world of one rank and ends it again.

    Raises:
        ValueError: when there is no usable checkpoint, the model has no such form, ``out`` is not
            new, or this is one of several ranks.
    """
    contents = inspect_checkpoint(checkpoint)
    folder = Path(contents.folder)
    check_format_version(folder, read_content(folder))
    config = load_saved_recipe(folder / CONFIG_FILE)
    check_has_hf_form(config)
    check_new_folder(out)
    with world_of_one(config) as layout, new_folder(out) as partial:
        return _write(contents, config, layout, partial, out, max_shard_bytes)


def _write(
    contents: CheckpointContents,
    config: RunConfig,
    layout: ParallelLayout,
    partial: Path,
    out: Path,
    max_shard_bytes: int,
) -> HfExport:
    from vqmoe_megatron.checkpoint.stored_layers import (
        WITH_EXPERTS,
        stored_layers,
        stored_stream,
    )
    from vqmoe_megatron.hf import module_tensors, tensors
    from vqmoe_megatron.hf.checkpoint_reader import CheckpointReader

    folder, model = Path(contents.folder), config.model
    names = [tensor.name for tensor in contents.tensors]
    reader = CheckpointReader.of(folder, contents.tensors, model.num_layers)
    shards = Shards(partial, max_shard_bytes)
    training = Shards(partial, max_shard_bytes, TRAINING_STEM)
    is_tied = not model.untie_embeddings_and_output_weights
    shards.add(tensors.outer_tensors(reader, model.vocab_size, is_tied))
    training.add(module_tensors.padding_tensors(reader, model.vocab_size))
    if (stream := stored_stream(folder, config, layout, names)) is not None:
        shards.add(tensors.stream_tensors(stream, contents.iteration))
        training.add(module_tensors.tensors_of_stream(stream))
    for number in range(model.num_layers):
        shards.add(tensors.layer_tensors(reader, number))
    code_dim, norms_sum = 0, False
    for layer in stored_layers(folder, config, layout, names, WITH_EXPERTS):
        found = dict(tensors.moe_tensors(layer, contents.iteration))
        for name, tensor in found.items():
            code_dim = tensor.shape[2] if name.endswith("discrete.codes") else code_dim
            norms_sum |= ".discrete.output_norm." in name
        shards.add(found.items())
        training.add(module_tensors.unsaid_tensors(layer, found))
    files = [*shards.finish(), *training.finish()]
    files += write_training(partial, folder, read_content(folder), files)
    described = hf_config(config, code_dim, norms_sum)
    files += ["config.json", f"{MODEL_FILE}.py", "README.md"]
    tokenizer, missing = _tokenizer(config, contents)
    if tokenizer is not None:
        files += write_tokenizer(partial, tokenizer, model.seq_length)
    progress = contents.progress or {}
    facts = {
        "iteration": contents.iteration,
        "consumed_samples": progress.get("consumed_samples", 0),
        "corpus": contents.corpus,
        "tokenizer": contents.tokenizer["kind"],
        "num_parameters": shards.num_parameters,
        "has_tokenizer": tokenizer is not None,
    }
    (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
    (partial / "README.md").write_text(model_card(config, facts), "utf-8")
    shutil.copyfile(Path(__file__).with_name(f"{MODEL_FILE}.py"), partial / f"{MODEL_FILE}.py")
    sizes = shards.num_parameters, shards.total_bytes, training.total_bytes
    return HfExport(out, contents.folder, contents.iteration, *sizes, files, missing)


def _tokenizer(config: RunConfig, contents: CheckpointContents) -> tuple[Tokenizer | None, str]:
    """The corpus' tokenizer, or why there is none; checked against the checkpoint's description."""
    if contents.tokenizer["kind"] == ByteTokenizer.kind:
        return ByteTokenizer(), ""
    try:
        return load_tokenizer(Path(config.data.path), contents.tokenizer), ""
    except (ValueError, OSError) as error:
        return None, str(error)
