"""The folder of a corpus as ``prepare`` writes it: whose files are in it, how they are replaced.

    DIR/.prepare.lock        held by the prepare that is at work
    DIR/.prepare-building/   what it has made so far: the new corpus, the files of an archive
    DIR/.prepare-complete/   a whole new corpus on its way to its place

1. A corpus is built in ``.prepare-building`` and flushed to the disk.
2. That is renamed to ``.prepare-complete``: from now on it is the corpus of DIR, and
   :func:`~vqmoe_megatron.data.corpus.load_corpus` looks there first.
3. Its files are linked into DIR, over those of the old corpus; ``corpus.json`` is the last.
4. ``.prepare-complete`` is renamed away and removed.

So a kill at any moment leaves the old corpus whole (before 2) or the new one (after it), and the
next prepare goes on from there. All of it happens inside DIR, which may be a mount point or lie in
a folder that cannot be written.

Nothing is replaced or removed but the names above, what ``corpus.json`` lists, and the sample
orders of that corpus in ``cache/``. A folder with anything else and no corpus is refused, and so is
one of the names above that prepare did not write: the lock is empty, the building folder holds
``MARK_FILE`` (or nothing) and a complete corpus the files that its ``corpus.json`` lists.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from vqmoe_megatron.data.corpus import (
    CACHE_DIR,
    COMPLETE_DIR,
    CORPUS_FILE,
    FINGERPRINT_CHARACTERS,
    FORMAT_VERSION,
    SPLITS,
    split_files,
)
from vqmoe_megatron.data.progress import PrepareProgress
from vqmoe_megatron.data.tokenizers import TOKENIZER_CLASSES
from vqmoe_megatron.rundir.atomic import sync
from vqmoe_megatron.rundir.file_lock import try_lock
from vqmoe_megatron.rundir.own_outputs import refuse_foreign

LOCK_FILE = ".prepare.lock"
BUILDING_DIR = ".prepare-building"
MARK_FILE = ".written-by-vqmoe-prepare"  # the first to come into the building folder, last to go
WORK_NAMES = {LOCK_FILE, BUILDING_DIR, COMPLETE_DIR}
TOKENIZER_FILES = {cls.file_name for cls in TOKENIZER_CLASSES.values() if cls.file_name}
CORPUS_NAMES = {CORPUS_FILE, *TOKENIZER_FILES, *(n for split in SPLITS for n in split_files(split))}
LINK_SUFFIX = ".link"
LISTED_NAMES = 3  # of foreign files, in a message


def check_out_folder(out_dir: Path, inputs: Iterable[Path], own_download: str | None) -> None:
    """Refuse a folder that is no corpus and not empty, and inputs that prepare would write over.

    ``own_download``: the name of an archive that an earlier prepare may have fetched. Reads only.

    Raises:
        ValueError: naming what is in the way.
    """
    for path in inputs:
        _check_input(path, out_dir)
    _check_work_names(out_dir)
    if not out_dir.is_dir():
        if os.path.lexists(out_dir):
            raise ValueError(f"--out {out_dir} is no directory; choose another one")
        return
    if recorded_names(out_dir) or recorded_names(out_dir / COMPLETE_DIR):
        return
    beside = {os.path.realpath(path) for path in inputs}
    foreign = sorted(
        entry.name
        for entry in out_dir.iterdir()
        if entry.name not in {*WORK_NAMES, own_download} and os.path.realpath(entry) not in beside
    )
    if foreign:
        more = ", ..." if len(foreign) > LISTED_NAMES else ""
        raise ValueError(
            f"--out {out_dir} is not empty and holds no corpus ({', '.join(foreign[:LISTED_NAMES])}"
            f"{more}); choose a new directory: prepare writes over nothing that it did not write"
        )


def check_outputs(out_dir: Path, names: Iterable[str]) -> None:
    """Raise ``ValueError`` for one of ``names`` in ``out_dir`` that is not of its corpus."""
    own = recorded_names(out_dir)
    for name in names:
        path = out_dir / name
        if os.path.lexists(path) and (name not in own or path.is_dir()):
            refuse_foreign(path, "vqmoe prepare")


def _check_work_names(out_dir: Path) -> None:
    """Raise ``ValueError`` for a lock, building or complete folder that prepare did not write."""
    lock, building = out_dir / LOCK_FILE, out_dir / BUILDING_DIR
    complete = out_dir / COMPLETE_DIR
    links = {f"{name}{LINK_SUFFIX}" for name in CORPUS_NAMES}
    is_ours = {
        lock: lambda: lock.is_file() and not lock.stat().st_size,
        building: lambda: (
            building.is_dir() and ((building / MARK_FILE).is_file() or not any(building.iterdir()))
        ),
        complete: lambda: (
            complete.is_dir()
            and {path.name for path in complete.iterdir()} <= recorded_names(complete) | links
        ),
    }
    for path, judge in is_ours.items():
        if os.path.lexists(path) and (path.is_symlink() or not judge()):
            refuse_foreign(path, "vqmoe prepare")


def recorded_names(folder: Path) -> set[str]:
    """Return the names that prepare wrote into ``folder``, by its ``corpus.json``; none without it.

    Raises:
        ValueError: for a ``corpus.json`` that is damaged, or another program's.
    """
    path = folder / CORPUS_FILE
    if not os.path.lexists(path):
        return set()
    try:
        description = json.loads(path.read_bytes())
        files = {description["tokenizer"]["file"]}
        for split in description["splits"]:
            files.update(split_files(split))
        if type(description["format_version"]) is not int:
            raise TypeError("format_version is no number")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged or was not written by vqmoe prepare ({error!r}); choose another "
            "--out, or move it and the files it stands for away"
        ) from error
    return {CORPUS_FILE, *(CORPUS_NAMES & files)}


def check_replaceable(out_dir: Path, damage: ValueError) -> None:
    """Raise ``damage`` unless the damaged corpus of ``out_dir`` has nothing that could be lost.

    A file that is missing or empty can be made again. Any other one that is not as ``corpus.json``
    says may be someone's own, and goes with ``--overwrite`` only.
    """
    try:
        description = json.loads((out_dir / CORPUS_FILE).read_bytes())
        sizes = {
            name: counts[kind]
            for split, counts in description["splits"].items()
            for name, kind in zip(split_files(split), ("bin_bytes", "idx_bytes"), strict=True)
        }
        tokenizer = description["tokenizer"]
        file, digest = tokenizer["file"], tokenizer["sha256"]
        is_ours = description["format_version"] == FORMAT_VERSION
    except (KeyError, TypeError, AttributeError):
        raise damage from None
    for name, num_bytes in sizes.items():
        path = out_dir / name
        is_ours &= not path.exists() or path.stat().st_size in (0, num_bytes)
    if file is not None and (path := out_dir / file).exists():
        content = path.read_bytes()
        is_ours &= not content or hashlib.sha256(content).hexdigest() == digest
    if not is_ours:
        raise damage


def finish_interrupted(out_dir: Path, progress: PrepareProgress) -> None:
    """Take the steps that a killed prepare has left."""
    if (out_dir / COMPLETE_DIR).exists():
        with building_folder(out_dir, progress):
            pass


@contextmanager
def building_folder(out_dir: Path, progress: PrepareProgress) -> Iterator[Path]:
    """Lock ``out_dir``, finish what was interrupted, hand out an empty folder to build in.

    Afterwards that folder is gone; where there is still no corpus, so are the lock and whatever was
    made of ``out_dir`` and its parents.

    Raises:
        ValueError: when another prepare holds the lock.
    """
    made = [path for path in (out_dir, *out_dir.parents) if not path.exists()]
    building = out_dir / BUILDING_DIR
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        with _open_lock(out_dir / LOCK_FILE, progress):
            try:
                _check_work_names(out_dir)
                _remove_building(building)
                building.mkdir()
                (building / MARK_FILE).touch()
                if (out_dir / COMPLETE_DIR).exists():
                    _finish(out_dir)
                yield building
            finally:
                with suppress(OSError, ValueError):
                    _check_work_names(out_dir)
                    _remove_building(building)
                if not (out_dir / CORPUS_FILE).exists():
                    (out_dir / LOCK_FILE).unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def _remove_building(building: Path) -> None:
    """Remove our own building folder; its mark goes last, so that a kill leaves it our own."""
    if building.exists():
        for path in building.iterdir():
            if path.name != MARK_FILE:
                shutil.rmtree(path)
        (building / MARK_FILE).unlink(missing_ok=True)
        building.rmdir()


def put_in_place(corpus_dir: Path, out_dir: Path) -> None:
    """Make the corpus in ``corpus_dir`` that of ``out_dir``; see the steps above.

    Raises:
        ValueError: for a file of that name that came into ``out_dir`` meanwhile.
    """
    check_outputs(out_dir, recorded_names(corpus_dir))
    for path in (*corpus_dir.iterdir(), corpus_dir):
        sync(path)
    os.rename(corpus_dir, out_dir / COMPLETE_DIR)
    sync(out_dir)
    _finish(out_dir)


def _finish(out_dir: Path) -> None:
    """Steps 3 and 4. May be interrupted and repeated."""
    complete = out_dir / COMPLETE_DIR
    new = recorded_names(complete)
    old = recorded_names(out_dir)
    for name in sorted(new - {CORPUS_FILE}):
        _link(complete / name, out_dir / name)
    for name in old - new:
        (out_dir / name).unlink(missing_ok=True)
    if old:
        _remove_sample_orders(out_dir)
    _link(complete / CORPUS_FILE, out_dir / CORPUS_FILE)
    sync(out_dir)
    obsolete = out_dir / BUILDING_DIR / "obsolete"
    os.rename(complete, obsolete)
    shutil.rmtree(obsolete)


def _link(source: Path, target: Path) -> None:
    """Give ``source`` the name ``target`` as well; a process that maps the old file keeps it."""
    if target.exists() and target.samefile(source):
        return
    link = source.parent / f"{source.name}{LINK_SUFFIX}"
    link.unlink(missing_ok=True)
    try:
        os.link(source, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, link)
        sync(link)
    os.replace(link, target)


def _remove_sample_orders(out_dir: Path) -> None:
    """Remove what training runs kept in ``cache/`` for the corpus that is being replaced."""
    fingerprint = hashlib.sha256((out_dir / CORPUS_FILE).read_bytes()).hexdigest()
    own = re.compile(rf"train-.*-{fingerprint[:FINGERPRINT_CHARACTERS]}")
    cache = out_dir / CACHE_DIR
    with suppress(OSError):  # there is none, it is shared, or holds more: it may stay
        for entry in cache.iterdir():
            if own.fullmatch(entry.name):
                shutil.rmtree(entry)
        cache.rmdir()


def _check_input(path: Path, out_dir: Path) -> None:
    real, place = Path(os.path.realpath(path)), Path(os.path.realpath(out_dir))
    for name in CORPUS_NAMES:
        target = out_dir / name
        if target.exists() and path.exists() and path.samefile(target):
            raise ValueError(
                f"--input {path} is {target}, which prepare would write; choose another --out"
            )
    if not {place / BUILDING_DIR, place / COMPLETE_DIR}.isdisjoint(real.parents):
        raise ValueError(
            f"--input {path} lies in a folder that prepare removes; move it, or choose another "
            "--out"
        )


def _open_lock(path: Path, progress: PrepareProgress) -> IO[str]:
    """Keep a second prepare out until the returned file is closed, or its process ends."""
    while True:
        stream = path.open("a")
        try:
            is_ours = try_lock(stream, fcntl.flock)
        except OSError as error:
            progress.note(f"{path}: no lock ({error}); do not prepare twice at the same time")
            return stream
        if not is_ours:
            stream.close()
            raise ValueError(f"another prepare is writing to {path.parent}; wait for it")
        if path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno())):
            return stream
        stream.close()  # its holder removed it at its end
