"""Corpora that are released as an archive of split files: WikiText-103 and One Billion Words.

| corpus | archive | train | valid | test |
|---|---|---|---|---|
| wikitext-103 | wikitext-103-v1.zip | wiki.train.tokens | wiki.valid.tokens | wiki.test.tokens |
| lm1b | 1-billion-word-...-r13output.tar.gz | 99 shards | heldout 00001 | heldout 00000 |

``--input`` is the archive, the folder it unpacks to, or its files. Other text does not pass: every
file of WikiText-103 has a known digest; One Billion Words has one for its archive, and files
without the archive must be the 99 shards with all of their sentences. For other text there is
corpus text.

Both are words separated by spaces, one paragraph or sentence per line. With the word tokenizer a
newline becomes ``<eos>``. Transformer-XL scores the same tokens: WikiText-103 with one ``<eos>``
per line, empty ones included; One Billion Words with one ``<S>`` in front of a sentence and one
behind it, of which it scores the second only, while here the ``<eos>`` of a sentence is also the
start of the next.

Transformer-XL and the released VQMoE use heldout 00000 of One Billion Words as valid and as test;
here valid is another shard, so that test is seen once.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

from vqmoe_megatron.data.documents import CHUNK_BYTES, Document
from vqmoe_megatron.data.download import verified_download
from vqmoe_megatron.data.packed_text import explained_packing, packing


@dataclass(frozen=True)
class ReleasedCorpus:
    """A public archive of split files, the same everywhere."""

    name: str
    url: str
    sha256: str  # of the archive
    splits: dict[str, tuple[str, ...]]  # file names in reading order, without folders
    file_sha1: dict[str, str] = field(default_factory=dict)  # file name -> digest, where published
    num_train_lines: int | None = None
    word_vocab_size: int | None = None  # of the word tokenizer unless asked otherwise; None: all

    @property
    def archive_name(self) -> str:
        """The archive's file name."""
        return PurePosixPath(self.url).name

    @property
    def file_names(self) -> list[str]:
        """Every file that is read, in reading order."""
        return [name for names in self.splits.values() for name in names]


RELEASED_CORPORA = {
    # Archive: SHA-256 as public loaders quote it (CorpusLoaders.jl, for one); its MD5 in torchtext
    # is 9ddaacaf6af0710eda8c456decff7832. Files: SHA-1 from gluon-nlp's wikitext.py. The paper's
    # address, s3.amazonaws.com/research.metamind.io, answers 403; this one is an author's.
    "wikitext-103": ReleasedCorpus(
        name="wikitext-103",
        url="https://wikitext.smerity.com/wikitext-103-v1.zip",
        sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        splits={
            "train": ("wiki.train.tokens",),
            "valid": ("wiki.valid.tokens",),
            "test": ("wiki.test.tokens",),
        },
        file_sha1={
            "wiki.train.tokens": "b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
            "wiki.valid.tokens": "c326ac59dc587676d58c422eb8a03e119582f92b",
            "wiki.test.tokens": "8a5befc548865cec54ed4273cf87dbbad60d1e47",
        },
    ),
    # Archive: SHA-256 from tensorflow_datasets (url_checksums/lm1b.txt), which also counts the
    # training sentences. Vocabulary: Chelba et al. 2013 (arXiv 1312.3005), words seen three times.
    "lm1b": ReleasedCorpus(
        name="lm1b",
        url=(
            "http://www.statmt.org/lm-benchmark/"
            "1-billion-word-language-modeling-benchmark-r13output.tar.gz"
        ),
        sha256="01ba60381110baf7f189dfd2b8374de371e8c9a340835793f190bdae9e90a34e",
        splits={
            "train": tuple(f"news.en-{shard:05d}-of-00100" for shard in range(1, 100)),
            "valid": ("news.en.heldout-00001-of-00050",),
            "test": ("news.en.heldout-00000-of-00050",),
        },
        num_train_lines=30_301_028,
        word_vocab_size=793_471,
    ),
}


def check_released_inputs(known: ReleasedCorpus, inputs: list[Path], download: bool) -> None:
    """Raise ``ValueError`` for inputs that cannot be ``known``; reads nothing."""
    if download and inputs:
        raise ValueError(f"corpus {known.name}: give --input or --download, not both")
    for path in inputs:
        if not path.exists():
            raise ValueError(f"input {path} does not exist")
        if len(inputs) > 1 and not path.is_file():
            raise ValueError(f"corpus {known.name}: {path} is no file; give one folder, or files")


def released_source(
    known: ReleasedCorpus, inputs: list[Path], download_dir: Path | None, unpack_dir: Path
) -> tuple[dict[str, Any], dict[str, list[Document]]]:
    """Return the description and the documents per split; a file is a document.

    Archives are unpacked into ``unpack_dir``, which the caller removes (540 MB and 4.2 GB).
    ``download_dir``: where to download to, None to stay off the network. Raises ``ValueError`` for
    what is missing, ambiguous or altered.
    """
    if not inputs and download_dir is None:
        raise ValueError(
            f"corpus {known.name} needs --input {known.archive_name} (from {known.url}), the "
            "folder it unpacks to, or --download"
        )
    if is_download := not inputs:
        inputs = [
            verified_download(
                known.url, download_dir, unpack_dir, lambda path: _check_archive(known, path)
            )
        ]
    if len(inputs) == 1 and inputs[0].is_dir():
        paths = _files_by_name(known, (path for path in inputs[0].rglob("*") if path.is_file()))
    elif len(inputs) == 1 and packing(inputs[0]) is not None:
        if not is_download:
            _check_archive(known, inputs[0])
        paths = _unpack(known, inputs[0], unpack_dir)
    else:
        paths = _files_by_name(known, iter(inputs))
    described = [_describe(paths[name]) for name in known.file_names]
    _check_files(known, described)
    sizes = {entry["name"]: entry["num_bytes"] for entry in described}
    documents = {
        split: [Document(paths[name], 0, sizes[name]) for name in names]
        for split, names in known.splits.items()
    }
    return {"inputs": described}, documents


def _check_archive(known: ReleasedCorpus, path: Path) -> None:
    digest = _describe(path)["sha256"]
    if digest != known.sha256:
        raise ValueError(
            f"{path} is not {known.archive_name}: its sha256 is {digest} instead of "
            f"{known.sha256}, so it is another text or a damaged copy; get it from {known.url}, or "
            "use corpus text for another text"
        )


def _members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield name and content of every regular file of a zip or (compressed) tar, in order."""
    if packing(path) == "zip":
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    with archive.open(entry) as stream:
                        yield entry.filename, stream
        return
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.isfile() and (stream := archive.extractfile(member)) is not None:
                yield member.name, stream


def _unpack(known: ReleasedCorpus, path: Path, unpack_dir: Path) -> dict[str, Path]:
    """Write the wanted members, by their bare names, into ``unpack_dir``."""
    wanted = set(known.file_names)
    unpack_dir.mkdir(parents=True, exist_ok=True)

    def written() -> Iterator[Path]:
        for member, stream in _members(path):
            if (name := PurePosixPath(member).name) in wanted:
                target = unpack_dir / name
                with target.open("wb") as file:
                    shutil.copyfileobj(stream, file, 2**20)
                yield target

    with explained_packing(path, "packed"):
        return _files_by_name(known, written())


def _files_by_name(known: ReleasedCorpus, paths: Iterator[Path]) -> dict[str, Path]:
    """Return the wanted files; ``ValueError`` naming what is missing or there twice."""
    wanted = set(known.file_names)
    found: dict[str, Path] = {}
    for path in paths:
        if path.name in wanted and found.setdefault(path.name, path) is not path:
            raise ValueError(f"{path.name} is there twice: {found[path.name]} and {path}")
    missing = [name for name in known.file_names if name not in found]
    if missing:
        listing = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"corpus {known.name}: {len(missing)} of {len(known.file_names)} files are missing "
            f"({listing}); --input takes {known.archive_name} (from {known.url}), the folder it "
            "unpacks to, or its files; use corpus text for another text"
        )
    return found


def _describe(path: Path) -> dict[str, Any]:
    """Return name, size, lines and digests of a file, in one pass."""
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in ("sha1", "sha256")}
    num_bytes = num_lines = 0
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            num_bytes += len(chunk)
            num_lines += chunk.count(b"\n")
            for digest in digests.values():
                digest.update(chunk)
    hexadecimal = {name: digest.hexdigest() for name, digest in digests.items()}
    return {"name": path.name, "num_bytes": num_bytes, "num_lines": num_lines, **hexadecimal}


def _check_files(known: ReleasedCorpus, described: list[dict[str, Any]]) -> None:
    for entry in described:
        expected = known.file_sha1.get(entry["name"], entry["sha1"])
        if entry["sha1"] != expected:
            raise ValueError(
                f"{entry['name']} is not the released file of {known.name}: its sha1 is "
                f"{entry['sha1']} instead of {expected}; use corpus text for another text"
            )
    train = set(known.splits["train"])
    num_lines = sum(entry["num_lines"] for entry in described if entry["name"] in train)
    if known.num_train_lines not in (None, num_lines):
        raise ValueError(
            f"the training files of {known.name} hold {num_lines:,} lines instead of "
            f"{known.num_train_lines:,}; use corpus text for a part of them"
        )
