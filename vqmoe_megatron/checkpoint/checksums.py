"""Checksums of a checkpoint's files: written with it, compared before anything in it is used.

``checksums.json`` in the folder: {"algorithm": "crc32", "files": {name: [bytes, crc32]}}, every
other file of it. CRC-32 finds damage, no forgery, and is faster than disks are.

- Saving: who writes a data file sums it, from its page cache; the first rank sums the small files.
- Looking at a checkpoint: the small files at once. ``inspect`` and ``export``: all files.
- Loading: every rank its share of the data files, then all agree.

Checkpoints of releases before 0.5 have none; they load, and that is said.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from vqmoe_megatron.checkpoint.folder import (
    CORPUS_COPY,
    FORMAT_FILE,
    LAYOUT_FILE,
    damaged,
    read_json_object,
)
from vqmoe_megatron.rundir.file_names import CONFIG_FILE

CHECKSUM_FILE = "checksums.json"
ALGORITHM = "crc32"
DATA_SUFFIX = ".distcp"
SMALL_FILES = (CONFIG_FILE, LAYOUT_FILE, CORPUS_COPY, FORMAT_FILE, "common.pt", ".metadata")
CHUNK_BYTES = 2**22
NUM_THREADS = 4  # zlib lets other threads run meanwhile
Checksum = tuple[int, int]  # the file's bytes and their CRC-32


def checksum(path: Path) -> Checksum:
    """Read a file once; return its length in bytes and its CRC-32.

    Raises:
        OSError: when it cannot be read.
    """
    num_bytes, crc = 0, 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            num_bytes, crc = num_bytes + len(chunk), zlib.crc32(chunk, crc)
    return num_bytes, crc


def write_checksums(folder: Path, of_data: Mapping[str, Checksum]) -> None:
    """Write the file of checksums: ``of_data``, by name, and those of all other files in it.

    Raises:
        OSError: when a file cannot be read or written.
    """
    rest = sorted(path for path in folder.iterdir() if path.name not in of_data)
    files = dict(of_data) | {path.name: checksum(path) for path in rest}
    text = json.dumps({"algorithm": ALGORITHM, "files": files}, indent=1)
    (folder / CHECKSUM_FILE).write_text(text + "\n", encoding="utf-8")


def read_checksums(folder: Path) -> dict[str, Checksum] | None:
    """Return the stored checksums by file name; None where a release before 0.5 wrote none.

    Raises:
        ValueError: when the file of checksums is damaged, or of another algorithm.
    """
    path = folder / CHECKSUM_FILE
    if not path.exists():
        return None
    content = read_json_object(path)
    try:
        if content["algorithm"] != ALGORITHM:
            raise ValueError(f"the algorithm is {content['algorithm']!r}, not {ALGORITHM!r}")
        return {name: (int(size), int(crc)) for name, (size, crc) in content["files"].items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise damaged(path, f"holds no checksums: {error}") from error


def foreign_files(folder: Path) -> list[str]:
    """Names in an ``iter_`` folder that no save wrote; that of the folder itself if it is a link.

    Without checksums (before 0.5, or no checkpoint at all) those of a checkpoint's files are known.
    """
    if folder.is_symlink():
        return [folder.name]
    try:
        known = set(read_checksums(folder) or ()) | {CHECKSUM_FILE}
    except ValueError:
        known = {CHECKSUM_FILE}
    return sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in known
        and not (path.is_file() and (path.suffix == DATA_SUFFIX or path.name in SMALL_FILES))
    )


def check_small_files(folder: Path) -> None:
    """Raise ``ValueError`` for a file without tensor data that is not as it was written."""
    stored = read_checksums(folder) or {}
    _refuse(_problems(folder, {n: s for n, s in stored.items() if not n.endswith(DATA_SUFFIX)}))


def check_all_files(folder: Path) -> int | None:
    """Compare every file; return how many, None where the checkpoint has no checksums.

    Reads the whole checkpoint.

    Raises:
        ValueError: naming the files that are not as they were written, and the ways on.
    """
    stored = read_checksums(folder)
    if stored is not None:
        _refuse(_problems(folder, stored))
    return None if stored is None else len(stored)


def check_data_together(folder: Path) -> bool:
    """Compare the data files, each rank its share; tell whether there are checksums at all.

    Communicates: one object gather over the world; all ranks call it together.

    Raises:
        ValueError: on all ranks alike; see :func:`check_all_files`.
    """
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    stored, mine = None, []
    try:
        stored = read_checksums(folder)
        data = sorted(name for name in stored or () if name.endswith(DATA_SUFFIX))
        mine = _problems(folder, {name: stored[name] for name in data[rank::world_size]})
    except ValueError as error:
        mine = [error]
    found: list[tuple[bool, list[ValueError]]] = [(False, [])] * world_size
    torch.distributed.all_gather_object(found, (stored is not None, mine))
    _refuse([problem for _, problems in found for problem in problems])
    return found[0][0]


def _problems(folder: Path, stored: Mapping[str, Checksum]) -> list[ValueError]:
    """What is wrong with each of the files, in the order of their names."""

    def problem(name: str) -> ValueError | None:
        path = folder / name
        try:
            found = checksum(path)
        except OSError as error:
            return damaged(path, f"cannot be read: {error.strerror}")
        if found == stored[name]:
            return None
        if found[0] != stored[name][0]:
            return damaged(path, f"has {found[0]:,} bytes instead of {stored[name][0]:,}")
        return damaged(path, "is not as it was written: its checksum differs")

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [found for found in pool.map(problem, sorted(stored)) if found is not None]


def _refuse(problems: list[ValueError]) -> None:
    """Raise the first problem; it says how many other files have one."""
    if problems:
        others = f" ({len(problems) - 1} more files are damaged)" if problems[1:] else ""
        raise ValueError(f"{problems[0]}{others}")
