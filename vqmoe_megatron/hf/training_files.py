"""What an export holds for training, beside the weights: Transformers reads none of it.

- ``training-00001-of-00001.safetensors``, ... and ``training.safetensors.index.json``: tensors of
  the model that the weights do not say bit for bit (``module_tensors``)
- ``run_config.yaml`` and ``corpus.json``: those of the checkpoint
- ``training.json``: how far training was, the schedule, and checksums of all that an import reads

The optimizer's moments and random states are not there: they start anew.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmoe_megatron import __version__
from vqmoe_megatron.checkpoint.checksums import ALGORITHM, checksum
from vqmoe_megatron.checkpoint.content import CheckpointContent
from vqmoe_megatron.checkpoint.folder import CORPUS_COPY
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_saved_recipe
from vqmoe_megatron.hf.shards import index_name
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.rundir.own_outputs import said_as_refusal

FORMAT_VERSION = 1
TRAINING_FILE = "training.json"
TRAINING_STEM = "training"
COPIED = (CONFIG_FILE, CORPUS_COPY)
# Without these no export is whole.
NEEDED = (*COPIED, index_name(), index_name(TRAINING_STEM))


@dataclass(frozen=True)
class Training:
    """What the files of a whole export say about its training."""

    folder: Path
    config: RunConfig
    corpus_content: bytes  # of corpus.json
    progress: dict[str, Any]  # the fields of Progress
    scheduler: dict[str, Any]  # of Megatron's schedule


def write_training(
    folder: Path, checkpoint: Path, content: CheckpointContent, tensor_files: Iterable[str]
) -> list[str]:
    """Write all but the tensors into an export that has them; return the names.

    Args:
        folder: the export.
        checkpoint: the ``iter_`` folder that it is made of.
        content: of that folder, of a format that this release loads.
        tensor_files: names of all files of tensors and their indices.

    Raises:
        ValueError: when a file cannot be written.
    """
    with said_as_refusal(folder):
        for name in COPIED:
            shutil.copyfile(checkpoint / name, folder / name)
        described = {
            "format_version": FORMAT_VERSION,
            "written_by": f"vqmoe_megatron {__version__}",
            "progress": content.common["progress"],
            "scheduler": content.common["scheduler"],
            "algorithm": ALGORITHM,
            "files": {name: checksum(folder / name) for name in (*COPIED, *tensor_files)},
        }
        described["own_crc32"] = _own_crc32(described)
        (folder / TRAINING_FILE).write_text(json.dumps(described, indent=1) + "\n", "utf-8")
    return [*COPIED, TRAINING_FILE]


def read_training(folder: Path) -> Training:
    """Compare all files that an import reads with their checksums, and read what is no tensor.

    Raises:
        ValueError: for a folder that is no such export, and for a damaged one, with the file.
    """
    if not folder.is_dir():
        what = "is no directory" if folder.exists() else "does not exist"
        raise ValueError(f"{folder} {what}; give a directory of vqmoe export --hf")
    if not (folder / TRAINING_FILE).is_file():
        raise ValueError(
            f"{folder} has no {TRAINING_FILE}: vqmoe export --hf did not write it, or it was saved "
            "again by Transformers, which keeps the weights alone; experts cannot be trained on "
            "without it. Give a directory as vqmoe export --hf left it"
        )
    described = _described(folder)
    for name, (num_bytes, crc) in described["files"].items():
        try:
            found = checksum(folder / name)
        except OSError as error:
            raise _damaged(folder / name, f"cannot be read ({error.strerror})") from error
        if found != (num_bytes, crc):
            raise _damaged(folder / name, "is not as it was written: its checksum differs")
    return Training(
        folder=folder,
        config=load_saved_recipe(folder / CONFIG_FILE),
        corpus_content=(folder / CORPUS_COPY).read_bytes(),
        progress=described["progress"],
        scheduler=described["scheduler"],
    )


def _described(folder: Path) -> dict[str, Any]:
    path = folder / TRAINING_FILE
    try:
        described = json.loads(path.read_text("utf-8"))
        version, by = described["format_version"], described["written_by"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"cannot be read ({error!r})") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}, this release reads {FORMAT_VERSION}; import it with the "
            f"release that wrote it ({by})"
        )
    try:
        files = {name: (int(size), int(crc)) for name, (size, crc) in described["files"].items()}
        is_usable = described["algorithm"] == ALGORITHM and set(NEEDED) <= set(files)
        is_usable &= all(Path(name).name == name for name in files)
        is_usable &= all(isinstance(described[part], dict) for part in ("progress", "scheduler"))
        is_usable &= described["own_crc32"] == _own_crc32(described)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"does not describe an export ({error!r})") from error
    if not is_usable:
        raise _damaged(path, "does not describe an export, or was changed")
    return described | {"files": files}


def _own_crc32(described: dict[str, Any]) -> int:
    """Of all that the file says besides this number."""
    rest = {name: value for name, value in described.items() if name != "own_crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _damaged(path: Path, problem: str) -> ValueError:
    return ValueError(
        f"damaged export: {path} {problem}; copy it again from where it is whole, or export the "
        "checkpoint again"
    )
