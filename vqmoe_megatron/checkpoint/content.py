"""Whether a checkpoint is whole: the one set of checks before it is resumed, inspected or exported.

Works in one process on files alone: no ranks, no tensor data, nothing unpickled but plain values
and torch's index.
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from vqmoe_megatron.checkpoint.checksums import check_small_files
from vqmoe_megatron.checkpoint.folder import (
    CORPUS_COPY,
    FORMAT_FILE,
    LAYOUT_FILE,
    damaged,
    read_json_object,
    ways_on,
)
from vqmoe_megatron.checkpoint.metadata import (
    INDEX_FILE,
    StoredContent,
    read_stored_content,
)
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_saved_recipe
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.rundir.file_names import CONFIG_FILE

FORMAT_VERSION = 2
COMMON_FILE = "common.pt"  # Megatron's file of plain values
NEEDED_FILES = (CONFIG_FILE, LAYOUT_FILE, CORPUS_COPY, INDEX_FILE, COMMON_FILE)
# Of Megatron's metadata.json. From 0.17 on it does not speak of common.pt any more.
BACKENDS = {"sharded_backend": ("torch_dist",), "common_backend": ("torch", None)}


@dataclass(frozen=True)
class CheckpointContent:
    """What the files of one whole checkpoint say."""

    config: RunConfig
    layout: ParallelLayout  # of the ranks that wrote it
    corpus: dict[str, Any]  # corpus.json
    common: dict[str, Any]  # Megatron's plain values; empty when they hold more than plain data
    stored: StoredContent


def read_content(folder: Path) -> CheckpointContent:
    """Read what describes the ``iter_`` folder and check that its data files are there and whole.

    No communication.

    Raises:
        ValueError: when a file is missing, foreign or damaged; the message names it and says what
            to do.
    """
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}: it is damaged, or no checkpoint of vqmoe; "
            f"{ways_on(folder)}"
        )
    _check_format(folder / FORMAT_FILE)
    content = CheckpointContent(
        config=_recipe(folder / CONFIG_FILE),
        layout=_layout(folder / LAYOUT_FILE),
        corpus=read_json_object(folder / CORPUS_COPY),
        common=_plain_values(folder / COMMON_FILE),
        stored=read_stored_content(folder),
    )
    check_small_files(folder)  # last: what is wrong with a file says more than that it differs
    return content


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn what torch raises, on all ranks, for tensors that cannot be read into a ``ValueError``.

    Of a damaged file without checksums torch only advises to trust it, which is left out.
    """
    try:
        yield
    except CheckpointException as error:
        causes = sorted(
            {
                str(cause) if isinstance(cause, OSError) else type(cause).__name__
                for cause, _ in error.failures.values()
            }
        )
        raise damaged(folder, f"holds tensors that cannot be read ({'; '.join(causes)})") from error


def check_format_version(folder: Path, content: CheckpointContent) -> None:
    """Raise ``ValueError`` for a checkpoint that this release can describe but not load."""
    version = content.common.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint format {version}, this release reads {FORMAT_VERSION}"
        )


def _check_format(path: Path) -> None:
    """Check Megatron's own description, which is written last and decides how to read the rest."""
    found = {name: read_json_object(path).get(name) for name in BACKENDS}
    if any(found[name] not in known for name, known in BACKENDS.items()):
        known = {name: values[0] for name, values in BACKENDS.items()}
        raise damaged(path, f"names the formats {found} instead of {known}")


def _recipe(path: Path) -> RunConfig:
    try:
        return load_saved_recipe(path)
    except ValueError as error:
        raise damaged(path, f"cannot be used: {error}") from error


def _layout(path: Path) -> ParallelLayout:
    fields = read_json_object(path)
    try:
        layout = ParallelLayout(**fields)
        if layout.data_parallel_size >= 1:
            return layout
        problem = f"{layout.world_size} ranks are less than one copy of the model takes"
    except (TypeError, ZeroDivisionError) as error:
        problem = str(error)
    raise damaged(path, f"describes no layout: {problem}")


def _plain_values(path: Path) -> dict[str, Any]:
    if not zipfile.is_zipfile(path):
        raise damaged(path, "is not a file of torch")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return {}
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise damaged(path, f"cannot be read: {error}") from error
    return values if isinstance(values, dict) else {}
