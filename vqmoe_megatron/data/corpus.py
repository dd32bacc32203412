"""What a prepared corpus is, and how it is loaded: ``corpus.json`` read, every file's size checked.

Imports neither torch nor megatron, so that a broken corpus is refused before any rank starts.

    DIR/corpus.json          the last to get its name: without it there is no corpus
    DIR/{train,valid,test}.bin/.idx   Megatron IndexedDataset files, one sequence per document
    DIR/tokenizer.json|model where the tokenizer has a file
    DIR/cache/               sample order of training runs (see datasets.py)
    DIR/.prepare-complete/   the same files of a corpus that is taking DIR (see corpus_folder.py)
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
CORPUS_FILE = "corpus.json"
COMPLETE_DIR = ".prepare-complete"
CACHE_DIR = "cache"
FINGERPRINT_CHARACTERS = 16  # of the corpus, in the names of its sample orders
SPLITS = ("train", "valid", "test")
# The part of a tokenizer's description that decides what a token id means.
TOKENIZER_IDENTITY = ("kind", "vocab_size", "sha256")
COUNTS = ("num_tokens", "num_documents", "num_bytes", "bin_bytes", "idx_bytes")


def split_files(split: str) -> tuple[str, str]:
    """Return the names of a split's tokens and of their index."""
    return f"{split}.bin", f"{split}.idx"


@dataclass(frozen=True)
class CorpusSplit:
    """One split: counts, and where its tokens are. ``prefix`` is the path without .bin or .idx."""

    name: str
    prefix: Path
    token_dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    bin_bytes: int
    idx_bytes: int

    @property
    def bin_path(self) -> Path:
        """The tokens of all documents in order, back to back."""
        return Path(f"{self.prefix}.bin")

    @property
    def idx_path(self) -> Path:
        """Megatron's index of the documents."""
        return Path(f"{self.prefix}.idx")

    @property
    def bytes_per_token(self) -> float:
        """Average text bytes that a token stands for; 1.0 for the byte tokenizer."""
        return self.num_bytes / self.num_tokens


@dataclass(frozen=True)
class Corpus:
    """A complete prepared corpus. ``content``: of its ``corpus.json``."""

    path: Path
    name: str
    source: dict[str, Any]
    tokenizer: dict[str, Any]
    vocab_size: int
    token_dtype: str
    splits: dict[str, CorpusSplit]
    content: bytes

    @property
    def fingerprint(self) -> str:
        """sha256 of ``corpus.json``, 64 hex digits."""
        return hashlib.sha256(self.content).hexdigest()

    def split(self, name: str) -> CorpusSplit:
        """Return a split; ``ValueError`` naming the existing ones if there is none of that name."""
        if name not in self.splits:
            legal = ", ".join(self.splits)
            raise ValueError(f"corpus {self.path} has no split {name!r}; it has {legal}")
        return self.splits[name]


def load_corpus(path: str | Path) -> Corpus:
    """Return the corpus prepared in directory ``path``; while one replaces another, either of them.

    Raises ``ValueError`` when the directory or ``corpus.json`` is missing, ``corpus.json`` lacks an
    entry or holds one of another type, a ``.bin`` or ``.idx`` is missing or has another size than
    recorded, or the tokenizer file has another sha256. Reads ``corpus.json`` and the tokenizer file
    only. Does not communicate.
    """
    path = Path(path)
    if path.is_file():
        raise ValueError(
            f"{path} is a text, not a corpus; prepare one of it, for instance: "
            f"vqmoe prepare text --input {path} --out data/{path.stem}"
        )
    if not path.is_dir():
        raise ValueError(
            f"no corpus directory {path}; prepare one, for instance: "
            f"vqmoe prepare stdlib --out {path}"
        )
    while True:
        found = read_description(path)
        if found is None:
            raise ValueError(
                f"{path} has no {CORPUS_FILE}: it was never prepared or preparing it was "
                f"interrupted; run vqmoe prepare CORPUS --out {path}"
            )
        try:
            corpus = _described_corpus(path, *found)
        except (ValueError, FileNotFoundError):
            if read_description(path) == found:
                raise
        else:
            if read_description(path) == found:
                return corpus


def current_corpus(corpus: Corpus) -> Corpus:
    """Return the corpus with the places where its files are now.

    Call it before and after opening them: between a run's start and that, another may have come.

    Raises:
        ValueError: when it is another corpus by now.
    """
    found = load_corpus(corpus.path)
    if found.content != corpus.content:
        raise ValueError(
            f"{corpus.path} was replaced by another corpus while this run was starting; start it "
            "again"
        )
    return found


def content_folder(path: Path) -> Path:
    """Return the folder that holds the files of the corpus of directory ``path``."""
    complete = path / COMPLETE_DIR
    return complete if (complete / CORPUS_FILE).is_file() else path


def read_description(path: Path) -> tuple[Path, bytes] | None:
    """Return the folder with the corpus of ``path`` and its ``corpus.json``; None without one."""
    try:
        folder = content_folder(path)
        return folder, (folder / CORPUS_FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        # It may have moved from .prepare-complete to its place in between.
        return None if content_folder(path) == folder == path else read_description(path)
    except OSError as error:
        raise ValueError(f"{path / CORPUS_FILE} cannot be read: {error.strerror}") from error


def _described_corpus(path: Path, folder: Path, content: bytes) -> Corpus:
    corpus_file = folder / CORPUS_FILE
    try:
        description = json.loads(content)
        version = description["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{corpus_file} has format_version {version}, this release reads {FORMAT_VERSION}; "
                "prepare the corpus again with --overwrite"
            )
        _check_types(description)
        splits = {
            name: CorpusSplit(
                name=name, prefix=folder / name, token_dtype=description["token_dtype"], **counts
            )
            for name, counts in description["splits"].items()
        }
        corpus = Corpus(
            path=path,
            name=description["corpus"],
            source=description["source"],
            tokenizer=description["tokenizer"],
            vocab_size=description["tokenizer"]["vocab_size"],
            token_dtype=description["token_dtype"],
            splits=splits,
            content=content,
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{corpus_file} is damaged or was not written by vqmoe prepare ({error!r}); prepare "
            "the corpus again in another directory"
        ) from error
    for split in splits.values():
        _check_size(split.bin_path, split.bin_bytes)
        _check_size(split.idx_path, split.idx_bytes)
    verify_tokenizer_file(folder, corpus.tokenizer)
    return corpus


def _check_types(description: dict[str, Any]) -> None:
    """Raise ``TypeError`` for the first entry that is not what prepare writes, KeyError if none."""
    tokenizer = description["tokenizer"]
    entries: list[tuple[str, Any, tuple[type, ...]]] = [
        ("corpus", description["corpus"], (str,)),
        ("source", description["source"], (dict,)),
        ("token_dtype", description["token_dtype"], (str,)),
        ("tokenizer.kind", tokenizer["kind"], (str,)),
        ("tokenizer.vocab_size", tokenizer["vocab_size"], (int,)),
        ("tokenizer.file", tokenizer["file"], (str, type(None))),
        ("tokenizer.sha256", tokenizer["sha256"], (str, type(None))),
    ]
    for split, counts in description["splits"].items():
        entries += [(f"splits.{split}.{name}", counts[name], (int,)) for name in COUNTS]
    for name, value, kinds in entries:
        if type(value) not in kinds:  # exact: a bool is no count
            raise TypeError(f"{name} is {value!r}, not {' or '.join(k.__name__ for k in kinds)}")
        if kinds == (int,) and value < 1:
            raise TypeError(f"{name} is {value}, not at least 1")


def _check_size(path: Path, expected_bytes: int) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is missing; prepare the corpus again with --overwrite")
    found_bytes = path.stat().st_size
    if found_bytes != expected_bytes:
        raise ValueError(
            f"{path} has {found_bytes} bytes, {CORPUS_FILE} says {expected_bytes}: it is truncated "
            "or from another corpus; prepare the corpus again with --overwrite"
        )


def verify_tokenizer_file(directory: Path, description: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless the described tokenizer file exists and has its sha256."""
    if description["file"] is None:
        return
    path = directory / description["file"]
    if not path.is_file():
        raise ValueError(f"{path} is missing; prepare the corpus again with --overwrite")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != description["sha256"]:
        raise ValueError(
            f"{path} has sha256 {found}, {CORPUS_FILE} says {description['sha256']}: "
            "token ids would change their meaning; prepare the corpus again with --overwrite"
        )


def check_tokenizer(
    corpus: Corpus, vocab_size: int | None, expected: dict[str, Any] | None = None
) -> None:
    """Raise ``ValueError`` unless a model fits the corpus.

    ``vocab_size``: ``model.vocab_size`` of the recipe, None where it is left to the corpus.
    ``expected``: the tokenizer description stored in a checkpoint, None without a checkpoint.
    """
    if vocab_size is not None and vocab_size < corpus.vocab_size:
        raise ValueError(
            f"model.vocab_size={vocab_size} is smaller than the {corpus.vocab_size} tokens of the "
            f"{corpus.tokenizer['kind']} tokenizer of {corpus.path}; leave it unset or raise it"
        )
    if expected is None:
        return
    differences = [
        f"{key}: checkpoint {expected.get(key)!r}, corpus {corpus.tokenizer[key]!r}"
        for key in TOKENIZER_IDENTITY
        if expected.get(key) != corpus.tokenizer[key]
    ]
    if differences:
        raise ValueError(
            f"the checkpoint was trained with another tokenizer than {corpus.path} has "
            f"({'; '.join(differences)}); use a corpus prepared with the checkpoint's tokenizer"
        )
