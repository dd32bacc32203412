"""Runs in the checkout's interpreter: arrays and tensors of a run directory as hashes, JSON.

    python read_run.py RUN_DIR

Uses numpy and torch's public reader of distributed checkpoints, nothing of vqmoe_megatron.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def hashed(value: torch.Tensor) -> str:
    """Type, shape and the hash of all bytes."""
    data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {list(value.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def readable(value: Any) -> Any:
    """``value`` with tensors as hashes, in what JSON can hold."""
    if isinstance(value, torch.Tensor):
        return hashed(value)
    if isinstance(value, dict):
        return {str(key): readable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [readable(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def checkpoint_contents(folder: Path) -> dict[str, Any]:
    """Return every key of a checkpoint, optimizer and random states included."""
    reader = checkpoint.FileSystemReader(str(folder))
    state: dict[str, Any] = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        if isinstance(stored, TensorStorageMetadata)
        else None
        for key, stored in reader.read_metadata().state_dict_metadata.items()
    }
    checkpoint.load(state, storage_reader=reader, no_dist=True)
    common = torch.load(folder / "common.pt", weights_only=True)
    return {
        **{f"tensor {key}": readable(value) for key, value in sorted(state.items())},
        **{f"common.pt {key}": readable(value) for key, value in sorted(common.items())},
    }


def main() -> None:
    """Print one JSON object."""
    run_dir, found = Path(sys.argv[1]), {}
    for file in sorted(run_dir.glob("*.npz")):
        with numpy.load(file) as arrays:
            for name in sorted(arrays.files):
                found[f"{file.name} {name}"] = hashed(torch.from_numpy(arrays[name]))
    for folder in sorted((run_dir / "checkpoints").glob("iter_*")):
        for key, value in checkpoint_contents(folder).items():
            found[f"checkpoint {folder.name}: {key}"] = value
    print(json.dumps(found))


if __name__ == "__main__":
    main()
