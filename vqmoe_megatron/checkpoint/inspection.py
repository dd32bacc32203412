"""What is in a checkpoint: the model, the layout that wrote it, what takes how many bytes.

Works in one process on files alone: no ranks, nothing unpickled but plain values and torch's index.
Tensor data is read for its checksums only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vqmoe_megatron.checkpoint.checksums import check_all_files
from vqmoe_megatron.checkpoint.content import read_content
from vqmoe_megatron.checkpoint.folder import FOLDER_PATTERN, complete_checkpoints, find_checkpoint
from vqmoe_megatron.checkpoint.metadata import StoredTensor
from vqmoe_megatron.rundir.file_names import CONFIG_FILE

USAGE = "give a run directory, its checkpoints folder, or one iter_ folder"
MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "moe_ffn_hidden_size",
    "num_moe_experts",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "moe_layer_freq",
    "vocab_size",
    "seq_length",
    "bf16",
)
VQ_FIELDS = ("num_codes", "num_code_slices", "quantizer", "code_map", "codebook_update", "path")

# The first group with a part that the tensor's name contains (".x") or starts with ("x") has it.
GROUP_OF_NAME = {
    "optimizer state": ("optimizer.",),
    "random state": ("random_state.",),
    "segment memory": ("segment_memory.",),
    "codebooks: codes": (".codebook.codes", ".codebook.scale", "code_stream.contexts.codes"),
    "code memory: rows": (".code_memory.",),
    "code memory: codes of tokens": ("code_stream.",),
    "codebooks: learned inputs": (".code_inputs.",),
    "codebooks: EMA sums": (".codebook.ema_sum",),
    "codebooks: usage": (".codebook.usage",),
    "codebooks: map and counters": (".codebook.", ".code_map.", ".threshold."),
    "experts": (".experts.", ".fill_rows."),
    "embeddings and output": ("embedding.", "output_layer."),
    "dense layers": ("decoder.",),
    "other": ("",),
}
SHOWN_ORDER = (
    "dense layers",
    "experts",
    "code memory: rows",
    "code memory: codes of tokens",
    "codebooks: codes",
    "codebooks: learned inputs",
    "codebooks: EMA sums",
    "codebooks: usage",
    "codebooks: map and counters",
    "embeddings and output",
    "optimizer state",
    "segment memory",
    "random state",
    "other",
)
PARAMETER_GROUPS = (
    "dense layers",
    "experts",
    "code memory: rows",
    "codebooks: codes",
    "codebooks: learned inputs",
    "embeddings and output",
)
PROJECTION, PROJECTIONS_GROUP = "assigner.codebook.projection", "codebooks: map and counters"
# Of routers, in a group of parameters.
BUFFER_NAMES = ("router.expert_bias", "router.steps_taken", "router.expert_of_token")


@dataclass(frozen=True)
class Group:
    """What belongs together in a checkpoint."""

    name: str
    num_tensors: int
    num_parameters: int  # elements of the model's parameters; none in buffers and optimizer state
    num_bytes: int
    dtypes: list[str]


@dataclass(frozen=True)
class FolderSize:
    """A checkpoint beside the inspected one."""

    name: str
    disk_bytes: int


@dataclass(frozen=True)
class CheckpointContents:
    """All that is known about one checkpoint; ``dataclasses.asdict`` of it is the JSON output."""

    folder: str
    iteration: int
    format_version: int | None  # None: not readable as plain values
    progress: dict[str, Any] | None  # as format_version
    model: dict[str, Any]
    vq: dict[str, Any]
    code_memory: str  # in words
    layout: dict[str, Any]
    corpus: str
    tokenizer: dict[str, Any]
    recipe_sha256: str
    checkpoints: list[FolderSize]  # all complete ones of the directory, oldest first
    incomplete: list[FolderSize]  # saves that are running or were cut off
    groups: list[Group]
    num_tensors: int
    num_parameters: int
    num_pieces: int
    tensor_bytes: int
    num_objects: int
    object_bytes: int
    disk_bytes: int
    num_verified_files: int | None  # compared with their checksums; None: it has none
    tensors: list[StoredTensor]


def inspect_checkpoint(path: Path) -> CheckpointContents:
    """Describe the checkpoint meant by a run directory, its checkpoints folder, or an iter_ folder.

    No communication.

    Raises:
        ValueError: when there is none, or it is incomplete, foreign or damaged; the message names
            the file and what to do.
    """
    folder = _find(Path(os.path.abspath(path)))
    content = read_content(folder)
    num_verified_files = check_all_files(folder)
    config, stored, common, corpus = content.config, content.stored, content.common, content.corpus
    groups = _groups(stored.tensors, config.vq.train_projection)
    return CheckpointContents(
        folder=str(folder),
        iteration=int(FOLDER_PATTERN.match(folder.name)[1]),
        format_version=common.get("format_version"),
        progress=common.get("progress"),
        model={name: getattr(config.model, name) for name in MODEL_FIELDS},
        vq={name: getattr(config.vq, name) for name in VQ_FIELDS},
        code_memory=config.code_memory.in_words,
        layout=asdict(content.layout) | {"data_parallel_size": content.layout.data_parallel_size},
        corpus=str(corpus.get("corpus")),
        tokenizer=dict(corpus.get("tokenizer") or {}),
        recipe_sha256=hashlib.sha256((folder / CONFIG_FILE).read_bytes()).hexdigest(),
        checkpoints=[
            FolderSize(name, _disk_bytes(folder.parent / name))
            for name in complete_checkpoints(folder.parent)
        ],
        incomplete=[
            FolderSize(entry.name, _disk_bytes(entry))
            for entry in sorted(folder.parent.glob("iter_*.incomplete"))
        ],
        groups=groups,
        num_tensors=len(stored.tensors),
        num_parameters=sum(group.num_parameters for group in groups),
        num_pieces=sum(tensor.num_pieces for tensor in stored.tensors),
        tensor_bytes=sum(tensor.num_bytes for tensor in stored.tensors),
        num_objects=stored.num_objects,
        object_bytes=stored.object_bytes,
        disk_bytes=_disk_bytes(folder),
        num_verified_files=num_verified_files,
        tensors=stored.tensors,
    )


def as_json(contents: CheckpointContents, with_tensors: bool) -> str:
    """Return one JSON object; the list of all tensors only when asked for."""
    content = asdict(contents)
    if not with_tensors:
        del content["tensors"]
    return json.dumps(content, indent=2)


def group_of(name: str) -> str:
    """Return the group that a stored tensor belongs to, by its name."""
    return next(
        group
        for group, parts in GROUP_OF_NAME.items()
        for part in parts
        if (part in name if part.startswith(".") else name.startswith(part))
    )


def _find(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} {'is a file' if path.exists() else 'does not exist'}; {USAGE}")
    if path.name.endswith(".incomplete"):
        raise ValueError(
            f"{path} is not finished: its save is still running, or was cut off, and then the "
            f"next save removes it; {_choice(path.parent)}"
        )
    folder = find_checkpoint(path)
    if folder is None:
        if FOLDER_PATTERN.match(path.name):
            raise ValueError(
                f"{path} is not complete: metadata.json, which is written last, is missing; "
                f"{_choice(path.parent)}"
            )
        checkpoints = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        raise ValueError(f"{path} names no checkpoint; {_choice(checkpoints)}")
    return folder


def _choice(checkpoints: Path) -> str:
    names = complete_checkpoints(checkpoints)
    if not names:
        return f"no complete one is in {checkpoints}; {USAGE}"
    return f"complete ones in {checkpoints}: {', '.join(names)}; give one of them"


def _disk_bytes(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a running save renames and rotates
            total += file.stat().st_size if file.is_file() else 0
    return total


def _groups(tensors: list[StoredTensor], trains_projection: bool) -> list[Group]:
    """``trains_projection``: projections of codebooks are parameters, and else buffers."""
    members: dict[str, list[StoredTensor]] = {name: [] for name in SHOWN_ORDER}
    for tensor in tensors:
        members[group_of(tensor.name)].append(tensor)
    return [
        Group(
            name=name,
            num_tensors=len(part),
            num_parameters=_num_parameters(name, part, trains_projection),
            num_bytes=sum(tensor.num_bytes for tensor in part),
            dtypes=sorted({tensor.dtype for tensor in part}),
        )
        for name, part in members.items()
        if part
    ]


def _num_parameters(group: str, tensors: list[StoredTensor], trains_projection: bool) -> int:
    if group == PROJECTIONS_GROUP and trains_projection:
        return sum(t.num_elements for t in tensors if t.name.endswith(PROJECTION))
    if group not in PARAMETER_GROUPS:
        return 0
    return sum(t.num_elements for t in tensors if not t.name.endswith(BUFFER_NAMES))
