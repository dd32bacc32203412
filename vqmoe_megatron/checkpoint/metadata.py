"""Which tensors a torch_dist checkpoint stores, from its index alone: no ranks, no tensor data.

The index (``.metadata``) is a pickle. Whoever unpickles runs what it names, so here it may name the
classes of torch's index and nothing else; another name is refused, not run.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vqmoe_megatron.checkpoint.folder import damaged

INDEX_FILE = ".metadata"
# What torch 2.13 and megatron-core 0.16 write into an index, by module.
INDEX_NAMES = {
    "torch": {"Size"},  # and dtypes
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}
# What unpickling a damaged file may raise, beside its own error (documentation of pickle).
DAMAGE = (
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class StoredTensor:
    """One global tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]  # global
    dtype: str  # without "torch."
    num_bytes: int
    num_pieces: int  # shards it was written in

    @property
    def num_elements(self) -> int:
        """Elements of the global tensor; 1 for a scalar."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StoredContent:
    """What the files of one checkpoint hold."""

    tensors: list[StoredTensor]  # by name
    num_objects: int  # entries that are no tensors
    object_bytes: int  # of those, as stored


def read_stored_content(folder: Path) -> StoredContent:
    """Read the index of ``folder`` and check that the files it names are there and long enough.

    No communication, no tensor data.

    Raises:
        ValueError: for an index that is missing, unreadable or names foreign code, and for data
            files that are missing, cut short or do not cover a tensor.
    """
    index = _read_index(folder / INDEX_FILE)
    try:
        _check_files(folder, index.storage_data)
        tensors = [
            _stored_tensor(folder, name, entry)
            for name, entry in sorted(index.state_dict_metadata.items())
            if hasattr(entry, "chunks")
        ]
        names = {tensor.name for tensor in tensors}
        objects = {name for name in index.state_dict_metadata if name not in names}
        object_bytes = sum(
            info.length for place, info in index.storage_data.items() if place.fqn in objects
        )
    except (AttributeError, TypeError) as error:
        raise damaged(folder / INDEX_FILE, f"is no index: {error}") from error
    return StoredContent(tensors, len(objects), object_bytes)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in INDEX_NAMES.get(module, ()):
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is no part of a checkpoint's index"
            )
        return super().find_class(module, name)


def _read_index(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            return _IndexUnpickler(file).load()
    except (OSError, pickle.UnpicklingError, *DAMAGE) as error:
        raise damaged(path, f"cannot be read: {error}") from error


def _check_files(folder: Path, storage_data: dict[Any, Any]) -> None:
    """Refuse data files that end before what the index places in them."""
    needed_bytes: dict[str, int] = {}
    for info in storage_data.values():
        end = info.offset + info.length
        needed_bytes[info.relative_path] = max(end, needed_bytes.get(info.relative_path, 0))
    for name, needed in sorted(needed_bytes.items()):
        file = folder / name
        if not file.is_file():
            raise damaged(file, "is missing")
        if file.stat().st_size < needed:
            found = file.stat().st_size
            raise damaged(file, f"has {found:,} bytes instead of {needed:,}")


def _stored_tensor(folder: Path, name: str, entry: Any) -> StoredTensor:
    covered = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
    num_elements = math.prod(entry.size)
    if covered != num_elements:
        problem = f"holds {covered:,} of the {num_elements:,} elements of {name}"
        raise damaged(folder, problem)
    return StoredTensor(
        name=name,
        shape=tuple(entry.size),
        dtype=str(entry.properties.dtype).removeprefix("torch."),
        num_bytes=num_elements * entry.properties.dtype.itemsize,
        num_pieces=len(entry.chunks),
    )
