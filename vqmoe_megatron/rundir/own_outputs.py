"""The rule for every command that writes: nothing is replaced but what the command itself wrote.

- What is new takes its name in one step (``atomic.py``); a kill or a full disk leaves what was
  there.
- What is there already is replaced only where it is proven to be the command's own, unchanged
  since: by its record (:func:`replace_recorded`), its seal (:func:`sealed`) or its content
  (:func:`is_result_of`).
  Everything else is refused before anything is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from vqmoe_megatron.rundir.atomic import replace_file, sync

RECORD_FILE = ".written.json"  # {file name: [sha256 of every content it may have]}
SEAL = re.compile(rb"(.*)<!-- sha256 of the text above: ([0-9a-f]{64}) -->\n", re.DOTALL)


def refuse_foreign(path: Path, writer: str) -> NoReturn:
    """Raise the ``ValueError`` about an existing file or folder that ``writer`` may not replace."""
    raise ValueError(
        f"{path} is there already, and {writer} did not write it, or it was changed since; move it "
        "away, or name another place"
    )


def is_result_of(path: Path, command: str) -> bool:
    """Tell whether ``path`` is a JSON object that says it is of ``command``."""
    try:
        return json.loads(path.read_bytes())["command"] == command
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def said_as_refusal(path: Path, also: type[Exception] = OSError) -> Iterator[None]:
    """Turn what the file system refuses, or ``also``, into a ``ValueError`` about ``path``."""
    try:
        yield
    except (OSError, also) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be written: {reason}; choose another place") from error


def check_new_folder(out: Path) -> None:
    """Raise ``ValueError`` unless ``out`` can be created here, or is an empty directory."""
    if out.is_dir():
        if any(out.iterdir()):
            raise ValueError(
                f"{out} is not empty; choose another directory, or move its content away"
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
        with said_as_refusal(out):
            partial.mkdir(parents=True)
        yield partial
        check_new_folder(out)
        with said_as_refusal(out):
            for path in (*partial.iterdir(), partial):
                sync(path)
            os.rename(partial, target)  # over an empty directory, never over a full one
            sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sealed(text: str) -> str:
    """Return Markdown or HTML with a last line that shows whether anyone has changed it."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}<!-- sha256 of the text above: {digest} -->\n"


def is_sealed(content: bytes) -> bool:
    """Tell whether ``content`` is as :func:`sealed` left it."""
    match = SEAL.fullmatch(content)
    return match is not None and hashlib.sha256(match[1]).hexdigest() == match[2].decode()


def check_recorded(folder: Path, names: Iterable[str], writer: str) -> None:
    """Raise ``ValueError`` for one of ``names`` that the folder's record does not cover."""
    record = _read_record(folder, writer)
    for name in names:
        if os.path.lexists(folder / name) and not _is_recorded(folder / name, record):
            refuse_foreign(folder / name, writer)


def replace_recorded(
    folder: Path, files: Mapping[str, bytes], obsolete: Iterable[str], writer: str
) -> None:
    """Write ``files`` in their order, and remove what else of ``obsolete`` the record covers.

    The record is written first with the old and the new digests, so that files of a killed call are
    known as well.

    Raises:
        ValueError: before the first write, for a file that ``writer`` did not write.
        OSError: when one cannot be written.
    """
    check_recorded(folder, files, writer)
    record = _read_record(folder, writer)
    left = [name for name in obsolete if name not in files]
    removed = [name for name in left if _is_recorded(folder / name, record)]
    new = {name: [hashlib.sha256(content).hexdigest()] for name, content in files.items()}
    both = {name: [*record.get(name, []), *new.get(name, [])] for name in {**record, **new}}
    replace_file(folder / RECORD_FILE, json.dumps(both, indent=1) + "\n")
    for name, content in files.items():
        replace_file(folder / name, content)
    for name in removed:
        (folder / name).unlink()
    replace_file(folder / RECORD_FILE, json.dumps(new, indent=1) + "\n")


def _read_record(folder: Path, writer: str) -> dict[str, list[str]]:
    path = folder / RECORD_FILE
    if not os.path.lexists(path):
        return {}
    try:
        record = json.loads(path.read_bytes())
        return {str(name): [str(digest) for digest in known] for name, known in record.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        refuse_foreign(path, writer)


def _is_recorded(path: Path, record: Mapping[str, list[str]]) -> bool:
    if path.name not in record or not path.is_file():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() in record[path.name]
