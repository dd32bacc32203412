"""The corpora we can prepare: where their text comes from and how it is split.

| corpus | text | split |
|---|---|---|
| stdlib | the running interpreter's ``*.py`` library | by hash of the file name: 95 / 2.5 / 2.5 % |
| text | one ``--input`` | in order, 90 / 5 / 5 %, after a newline |
| text | two or three ``--input`` | given: train, valid[, test] |
| enwik8, text8 | one ``--input``, or ``--download`` | in order, 90M / 5M / 5M bytes |
| wikitext-103, lm1b | see released.py | the released files |

An ``--input`` may be packed; see packed_text.py. A document is a file of stdlib, or the part of a
file that makes up a split. stdlib leaves out tests and site-packages.

Where the tokenizer reads characters, a split never starts inside one (it moves by up to 3 bytes).
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmoe_megatron.data.corpus import SPLITS
from vqmoe_megatron.data.documents import Document, hash_text
from vqmoe_megatron.data.download import verified_download
from vqmoe_megatron.data.packed_text import open_text, text_size
from vqmoe_megatron.data.released import (
    RELEASED_CORPORA,
    check_released_inputs,
    released_source,
)

MAX_LINE_SEARCH_BYTES = 2**20  # how far to look for a newline to split after
STDLIB_SKIPPED = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class KnownText:
    """A public text that is the same everywhere: its address, size and digest of its content."""

    name: str
    url: str
    num_bytes: int
    algorithm: str
    digest: str
    valid_bytes: int
    test_bytes: int


KNOWN_TEXTS = {
    # Size and SHA-1: http://mattmahoney.net/dc/textdata.html, table of test files.
    "enwik8": KnownText(
        name="enwik8",
        url="http://mattmahoney.net/dc/enwik8.zip",
        num_bytes=100_000_000,
        algorithm="sha1",
        digest="57b8363b814821dc9d47aa4d41f58733519076b2",
        valid_bytes=5_000_000,
        test_bytes=5_000_000,
    ),
    # MD5 of the unpacked file, as public loaders quote it (tensorsets' text8.py, for one).
    "text8": KnownText(
        name="text8",
        url="http://mattmahoney.net/dc/text8.zip",
        num_bytes=100_000_000,
        algorithm="md5",
        digest="3bea1919949baf155f99411df5fada7e",
        valid_bytes=5_000_000,
        test_bytes=5_000_000,
    ),
}
LEGAL_CORPORA = ("stdlib", "text", *KNOWN_TEXTS, *RELEASED_CORPORA)


@dataclass(frozen=True)
class Source:
    """A described text: ``description`` goes to ``corpus.json``, ``documents`` are per split.

    ``notices``: lines about it that the user should read.
    """

    description: dict[str, Any]
    documents: dict[str, list[Document]]
    notices: tuple[str, ...] = ()


def check_corpus_request(corpus: str, inputs: list[Path], download: bool) -> None:
    """Raise ``ValueError`` for an unknown corpus or for inputs that do not fit it."""
    if corpus not in LEGAL_CORPORA:
        raise ValueError(f"corpus {corpus!r} is unknown; choose one of {', '.join(LEGAL_CORPORA)}")
    if corpus in RELEASED_CORPORA:
        check_released_inputs(RELEASED_CORPORA[corpus], inputs, download)
    if download and corpus not in (*KNOWN_TEXTS, *RELEASED_CORPORA):
        raise ValueError(f"corpus {corpus} has nothing to download; leave out --download")
    if corpus == "stdlib" and inputs:
        raise ValueError("corpus stdlib takes no --input; use corpus text for files of your own")
    if corpus == "text" and not 1 <= len(inputs) <= 3:
        raise ValueError(
            f"corpus text needs one --input (split 90/5/5) or two or three (train, valid, test), "
            f"not {len(inputs)}"
        )
    if corpus in KNOWN_TEXTS:
        if download and inputs:
            raise ValueError(f"corpus {corpus}: give --input or --download, not both")
        if len(inputs) > 1:
            raise ValueError(f"corpus {corpus} is one file; got {len(inputs)} --input")


def open_source(
    corpus: str,
    inputs: list[Path],
    download_dir: Path | None,
    keep_characters: bool,
    unpack_dir: Path,
) -> Source:
    """Find, verify and split the text of ``corpus``.

    ``download_dir``: where a download is kept, None to stay off the network. ``keep_characters``:
    do not split inside a UTF-8 character. ``unpack_dir``: where the files of an archive go, and a
    download until it is verified; the source reads them there. Raises ``ValueError`` for missing,
    empty, too small or altered input.
    """
    if corpus in RELEASED_CORPORA:
        return Source(*released_source(RELEASED_CORPORA[corpus], inputs, download_dir, unpack_dir))
    if corpus == "stdlib":
        return _stdlib_source(Path(sysconfig.get_path("stdlib")))
    if corpus == "text":
        return _text_source(inputs, keep_characters)
    known = KNOWN_TEXTS[corpus]
    if inputs:
        return known_text_source(known, inputs[0], keep_characters)
    if download_dir is None:
        raise ValueError(
            f"corpus {corpus} needs --input FILE (the text or its zip, from {known.url}) "
            "or --download"
        )
    archive = verified_download(
        known.url,
        download_dir,
        unpack_dir,
        lambda path: known_text_source(known, path, keep_characters),
    )
    return known_text_source(known, archive, keep_characters)


def archive_name(corpus: str) -> str | None:
    """Return the name under which a download of ``corpus`` is kept; None where there is none."""
    known = KNOWN_TEXTS.get(corpus) or RELEASED_CORPORA.get(corpus)
    return Path(known.url).name if known else None


def known_text_source(known: KnownText, path: Path, keep_characters: bool) -> Source:
    """Verify size and digest of ``path`` against ``known`` and split it in order."""
    num_bytes = text_size(path)
    if num_bytes != known.num_bytes:
        raise ValueError(
            f"{path} is not {known.name}: {num_bytes} bytes instead of {known.num_bytes}; "
            "use corpus text for another text"
        )
    digests = hash_text(path, (known.algorithm, "sha256"))
    if digests[known.algorithm] != known.digest:
        raise ValueError(
            f"{path} is not {known.name}: its {known.algorithm} is {digests[known.algorithm]} "
            f"instead of {known.digest}; use corpus text for another text"
        )
    test_start = num_bytes - known.test_bytes
    bounds = [0, test_start - known.valid_bytes, test_start, num_bytes]
    if keep_characters:
        bounds[1:3] = [_next_character(path, bound) for bound in bounds[1:3]]
    return Source(
        {"inputs": [{"name": path.name, "num_bytes": num_bytes, **digests}]},
        _split_at(path, bounds),
    )


def _text_source(inputs: list[Path], keep_characters: bool) -> Source:
    described: list[dict[str, Any]] = []
    for path in inputs:
        num_bytes = text_size(path)
        if num_bytes == 0:
            raise ValueError(f"input file {path} is empty")
        digests = hash_text(path, ("sha256",))
        described.append({"name": path.name, "num_bytes": num_bytes, **digests})
    description = {"inputs": described}
    if len(inputs) > 1:
        return Source(
            description,
            {
                split: [Document(path, 0, entry["num_bytes"])]
                for split, path, entry in zip(SPLITS, inputs, described, strict=False)
            },
            tuple(_repetitions(described)),
        )
    path, num_bytes = inputs[0], described[0]["num_bytes"]
    bounds = [0, 0, 0, num_bytes]
    for position, percent in ((1, 90), (2, 95)):
        bounds[position] = _next_line(path, num_bytes * percent // 100, keep_characters)
    if not bounds[0] < bounds[1] < bounds[2] < bounds[3]:
        raise ValueError(
            f"{path} ({num_bytes} bytes) is too small to split 90/5/5 at line ends; give train, "
            "valid and test as three --input"
        )
    return Source(description, _split_at(path, bounds))


def _repetitions(described: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each split with the bytes of an earlier one.

    Said, not refused: to overfit on purpose is a use, and a copy behind another name looks alike.
    """
    first: dict[str, str] = {}
    for split, entry in zip(SPLITS, described, strict=False):
        earlier = first.setdefault(entry["sha256"], split)
        if earlier != split:
            yield (
                f"{split} ({entry['name']}) is the text of {earlier}, byte for byte: give another "
                f"--input unless {split} is meant to score what {earlier} holds"
            )


def _stdlib_source(root: Path) -> Source:
    paths = {
        path.relative_to(root).as_posix(): path
        for path in root.rglob("*.py")
        if path.is_file() and not STDLIB_SKIPPED.intersection(path.relative_to(root).parts)
    }
    digest = hashlib.sha256()
    documents: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for name in sorted(paths):
        content = paths[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
        if content:
            documents[stdlib_split(name)].append(Document(paths[name], 0, len(content)))
    if not all(documents.values()):
        raise ValueError(
            f"the interpreter's library in {root} has too few .py files for three splits; "
            "use corpus text"
        )
    files = [document for split in documents.values() for document in split]
    description = {
        "python_version": platform.python_version(),
        "num_files": len(files),
        "num_bytes": sum(document.num_bytes for document in files),
        "sha256": digest.hexdigest(),
    }
    return Source(description, documents)


def stdlib_split(name: str) -> str:
    """Return the split of the library file ``name``, by its hash alone."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.95 else "valid" if share < 0.975 else "test"


def _split_at(path: Path, bounds: list[int]) -> dict[str, list[Document]]:
    return {
        split: [Document(path, bounds[number], bounds[number + 1] - bounds[number])]
        for number, split in enumerate(SPLITS)
    }


def _next_line(path: Path, position: int, keep_characters: bool) -> int:
    """Return the start of the first line after ``position``.

    Without a newline nearby: after a space, else ``position`` or the next character.
    """
    with open_text(path) as stream:
        stream.seek(position)
        following = stream.read(MAX_LINE_SEARCH_BYTES)
    for mark in (b"\n", b" "):
        if (found := following.find(mark)) >= 0:
            return position + found + 1
    return _next_character(path, position) if keep_characters else position


def _next_character(path: Path, position: int) -> int:
    """Return the first position from ``position`` on that is not inside a UTF-8 character."""
    with open_text(path) as stream:
        stream.seek(position)
        following = stream.read(4)
    return position + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), 0)
