"""One way to write a file: aside, flushed to the disk, and named in one step.

A reader sees the old or the new content, whatever is killed, and so it is after a power cut.
Folders that take their place whole (checkpoints, corpora, sample orders) rename themselves, each
with its own rule for what stands there already.
"""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def replace_file(path: Path, content: bytes | str) -> None:
    """Write ``path`` whole; of several writers the last wins.

    Raises:
        OSError: when it cannot be written; the old content stays.
    """
    # Ranks on several nodes may have one process id and write at the same time.
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def name_file(partial: Path, path: Path) -> None:
    """Give a file that was written under another name of the same file system its own."""
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
