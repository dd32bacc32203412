"""What a text setting may hold: what files, logs and the operating system can take."""

from __future__ import annotations

import os
from typing import Any

PATH_KEYS = ("data.path", "data.cache_dir", "train.output_dir", "checkpoint.load", "finetune.path")
MOST_NAME_BYTES = 255  # of Linux' file systems
MOST_PATH_BYTES = 4096 - 256  # the kernel's limit, less the names of what a run writes below it


def text_problem(key: str, value: Any) -> str | None:
    """Describe a text that cannot be stored, or that names no path where a path is meant."""
    if not isinstance(value, str):
        return None
    if "\0" in value:
        return f"{key}={_cut(value)} holds a NUL character; leave it out"
    try:
        num_bytes = len(value.encode())
    except UnicodeEncodeError:  # a name of the file system in another encoding
        return f"{key}={_cut(value)} is not valid Unicode; write or rename it in UTF-8"
    if key not in PATH_KEYS:
        return None
    if not value.strip():
        return f"{key} is empty; name a directory, or leave it out for the default"
    if value.split("/")[0].startswith("~"):
        home = os.path.expanduser(value)
        return f"{key}={value}: ~ is not expanded here; write {home}, or ./{value} if it is a name"
    longest = max(len(name.encode()) for name in value.split("/"))
    if longest > MOST_NAME_BYTES or num_bytes > MOST_PATH_BYTES:
        return (
            f"{key}={_cut(value)} is too long: {num_bytes:,} bytes, its longest name {longest:,}; "
            f"at most {MOST_PATH_BYTES:,} and {MOST_NAME_BYTES}"
        )
    return None


def _cut(value: str) -> str:
    """In quotes, printable in any encoding, and not the whole of a long one."""
    return ascii(value if len(value) <= 60 else f"{value[:60]}...")
