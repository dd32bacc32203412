"""The folder that ``vqmoe export --tables`` writes: complete, or not there.

- ``layer_0001.safetensors``, ...: one file per layer, numbered from 1 over the whole model
- ``code_memory.safetensors`` and ``memory_0001.safetensors``, ...: of models with a code memory
- ``tables.json``: the index, with sizes and checksums

Written into ``NAME.<random>.incomplete`` beside it and renamed (own_outputs.new_folder).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from vqmoe_megatron.rundir.own_outputs import said_as_refusal

INDEX_NAME = "tables.json"
HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file."""

    shape: list[int]
    dtype: str
    num_bytes: int


@dataclass(frozen=True)
class TableFile:
    """One written file."""

    name: str
    num_bytes: int
    sha256: str
    tensors: dict[str, TensorEntry]


def write_table(
    folder: Path, layer_number: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> TableFile:
    """Write one layer's CPU tensors and describe the file.

    Raises:
        ValueError: when it cannot be written, for instance on a full disk.
    """
    return write_tensors(folder / f"layer_{layer_number:04d}.safetensors", tensors, metadata)


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> TableFile:
    """Write CPU tensors into a new file and describe it; ``ValueError`` as :func:`write_table`."""
    with said_as_refusal(path, SafetensorError):
        save_file(tensors, path, metadata)
        return TableFile(
            name=path.name,
            num_bytes=path.stat().st_size,
            sha256=sha256(path),
            tensors={
                name: TensorEntry(
                    list(tensor.shape),
                    str(tensor.dtype).removeprefix("torch."),
                    tensor.numel() * tensor.element_size(),
                )
                for name, tensor in tensors.items()
            },
        )


def write_index(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``tables.json``.

    Raises:
        ValueError: when it cannot be written.
    """
    with said_as_refusal(folder / INDEX_NAME):
        text = json.dumps(content, indent=2) + "\n"
        (folder / INDEX_NAME).write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the checksum of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
