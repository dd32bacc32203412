"""The folder that ``vqmoe export --tables`` writes: complete, or not there.

- ``layer_0001.safetensors``, ...: one file per layer, numbered from 1 over the whole model
- ``tables.json``: the index, with sizes and checksums

Written into ``NAME.<random>.incomplete`` beside it, flushed to the disk, then renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

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


def check_new_folder(out: Path) -> None:
    """Raise ``ValueError`` unless ``out`` can be created here, or is an empty directory."""
    if out.is_dir():
        if any(out.iterdir()):
            raise ValueError(
                f"{out} is not empty; choose another directory, or remove it to export again"
            )
    elif out.exists() or out.is_symlink():
        raise ValueError(f"{out} is in the way: it is no directory; choose another one")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Hand out a folder to write into; it becomes ``out`` when the block ends without an error.

    Otherwise it is removed.

    Raises:
        ValueError: when ``out`` is not new, or cannot be written.
    """
    check_new_folder(out)
    target = Path(os.path.realpath(out))  # an empty folder behind a link is filled, not the link
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.incomplete")
    try:
        with _said_as_refusal(out):
            partial.mkdir(parents=True)
        yield partial
        check_new_folder(out)
        with _said_as_refusal(out):
            for path in (*partial.iterdir(), partial):
                _sync(path)
            os.rename(partial, target)  # over an empty directory, never over a full one
            _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_table(
    folder: Path, layer_number: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> TableFile:
    """Write one layer's CPU tensors and describe the file.

    Raises:
        ValueError: when it cannot be written, for instance on a full disk.
    """
    path = folder / f"layer_{layer_number:04d}.safetensors"
    with _said_as_refusal(path):
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
    with _said_as_refusal(folder / INDEX_NAME):
        text = json.dumps(content, indent=2) + "\n"
        (folder / INDEX_NAME).write_text(text, encoding="utf-8")


def sha256(path: Path) -> str:
    """Return the checksum of a file, read piece by piece."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextlib.contextmanager
def _said_as_refusal(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be written: {reason}; choose another place") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
