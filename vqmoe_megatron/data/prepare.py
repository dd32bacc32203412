"""``vqmoe prepare``: text in, a corpus directory out, in memory that does not grow with the text.

1. Check the request, take the directory's lock, look at a corpus that is already there.
2. Find, verify and split the text (corpora.py).
3. Build the tokenizer from the train split, in one or more passes of pieces of about 64 KiB.
4. Per split: encode piece by piece into ``SPLIT.bin``, then write ``SPLIT.idx``.
5. Write ``corpus.json``, last and atomically: a killed run leaves no loadable corpus.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqmoe_megatron.data.corpora import KNOWN_TEXTS, Source, check_corpus_request, open_source
from vqmoe_megatron.data.corpus import CORPUS_FILE, FORMAT_VERSION, SPLITS, Corpus, load_corpus
from vqmoe_megatron.data.documents import document_pieces
from vqmoe_megatron.data.indexed_writer import IndexedWriter, token_dtype
from vqmoe_megatron.data.progress import PrepareProgress
from vqmoe_megatron.data.released import RELEASED_CORPORA
from vqmoe_megatron.data.tokenizers import (
    TOKENIZER_CLASSES,
    Tokenizer,
    check_tokenizer_request,
    describe_tokenizer,
)

LOCK_FILE = ".prepare.lock"
CACHE_DIR = "cache"
UNPACK_DIR = ".unpacked"


def prepare_corpus(
    corpus: str,
    out_dir: Path,
    inputs: list[Path],
    tokenizer: str = "byte",
    vocab_size: int | None = None,
    download: bool = False,
    overwrite: bool = False,
) -> Corpus:
    """Prepare ``corpus``, one of corpora.LEGAL_CORPORA, in ``out_dir`` and return it.

    ``inputs``: see corpora.py and released.py. ``vocab_size``: cap of the word or size of the
    sentencepiece vocabulary. A complete corpus from the same request is returned as it is; from
    another request it is refused unless ``overwrite``. Raises ``ValueError`` for whatever a user
    can cause; the network is used only with ``download``. Does not communicate.
    """
    out_dir, inputs = Path(out_dir), [Path(path) for path in inputs]
    check_corpus_request(corpus, inputs, download)
    check_tokenizer_request(tokenizer, vocab_size)
    if tokenizer == "word" and vocab_size is None and corpus in RELEASED_CORPORA:
        vocab_size = RELEASED_CORPORA[corpus].word_vocab_size
    request = {"corpus": corpus, "tokenizer": tokenizer, "vocab_size": vocab_size}
    keep_characters = TOKENIZER_CLASSES[tokenizer].needs_utf8
    with _explained(out_dir), PrepareProgress() as progress:
        out_dir.mkdir(parents=True, exist_ok=True)
        with _locked(out_dir, progress), _unpack_dir(out_dir) as unpack_dir:
            existing = None if overwrite else _existing_corpus(out_dir, progress)
            if existing is not None and _is_known(corpus, inputs):
                _check_same_request(existing, request, source=None)
            else:
                download_dir = out_dir if download else None
                source = open_source(corpus, inputs, download_dir, keep_characters, unpack_dir)
                if existing is None:
                    return _write_corpus(out_dir, request, source, progress)
                _check_same_request(existing, request, source)
            progress.note(f"{out_dir} already holds this corpus; nothing to do")
            return existing


def _is_known(corpus: str, inputs: list[Path]) -> bool:
    """Whether the text needs no look: it can only be the one with the recorded digest."""
    return corpus in RELEASED_CORPORA or (corpus in KNOWN_TEXTS and not inputs)


@contextmanager
def _unpack_dir(out_dir: Path) -> Iterator[Path]:
    """A folder for an archive's files, removed with them; one that a killed run left goes first."""
    folder = out_dir / UNPACK_DIR
    if folder.exists():
        shutil.rmtree(folder)
    try:
        yield folder
    finally:
        if folder.exists():
            shutil.rmtree(folder)


@contextmanager
def _explained(out_dir: Path) -> Iterator[None]:
    """Turn what the file system refuses, or a damaged zip, into a ``ValueError``."""
    try:
        yield
    except (OSError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"cannot prepare a corpus in {out_dir}: {error}") from error


@contextmanager
def _locked(out_dir: Path, progress: PrepareProgress) -> Iterator[None]:
    """Keep a second prepare out of ``out_dir``; the lock dies with the process."""
    with (out_dir / LOCK_FILE).open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another prepare is writing to {out_dir}; wait for it") from error
        except OSError as error:
            progress.note(f"{out_dir}: no lock ({error}); do not prepare twice at the same time")
        yield


def _existing_corpus(out_dir: Path, progress: PrepareProgress) -> Corpus | None:
    if not (out_dir / CORPUS_FILE).is_file():
        return None
    try:
        return load_corpus(out_dir)
    except ValueError as error:
        progress.note(f"preparing again: {error}")
        return None


def _check_same_request(existing: Corpus, request: dict[str, Any], source: Source | None) -> None:
    recorded = json.loads((existing.path / CORPUS_FILE).read_text("utf-8"))["request"]
    wanted = dict(request)
    if source is not None:
        recorded = {**recorded, "source": existing.source}
        wanted["source"] = source.description
    differences = [
        f"{key}: it has {recorded.get(key)!r}, asked for {value!r}"
        for key, value in wanted.items()
        if recorded.get(key) != value
    ]
    if differences:
        raise ValueError(
            f"{existing.path} holds another corpus ({'; '.join(differences)}); choose another "
            "--out or replace it with --overwrite"
        )


def _write_corpus(
    out_dir: Path, request: dict[str, Any], source: Source, progress: PrepareProgress
) -> Corpus:
    (out_dir / CORPUS_FILE).unlink(missing_ok=True)
    if (out_dir / CACHE_DIR).exists():
        shutil.rmtree(out_dir / CACHE_DIR)
    tokenizer_class = TOKENIZER_CLASSES[request["tokenizer"]]

    def pieces(split: str) -> Iterator[bytes]:
        documents = source.documents.get(split, [])
        progress.stage(f"tokenizer: {split}", sum(document.num_bytes for document in documents))
        for document in documents:
            for piece in document_pieces(document, tokenizer_class.cut, tokenizer_class.needs_utf8):
                yield piece
                progress.advance(len(piece))

    tokenizer = tokenizer_class.train(pieces, request["vocab_size"])
    for any_class in TOKENIZER_CLASSES.values():
        if any_class.file_name:
            (out_dir / any_class.file_name).unlink(missing_ok=True)
    tokenizer.save(out_dir)
    splits = {}
    for split in SPLITS:
        for suffix in ("bin", "idx"):  # unlinked: a process that maps the old file keeps it
            (out_dir / f"{split}.{suffix}").unlink(missing_ok=True)
        if split in source.documents:
            splits[split] = _write_split(out_dir, split, source, tokenizer, progress)
    description = {
        "format_version": FORMAT_VERSION,
        "corpus": request["corpus"],
        "request": request,
        "source": source.description,
        "tokenizer": describe_tokenizer(tokenizer, out_dir),
        "token_dtype": token_dtype(tokenizer.vocab_size),
        "splits": splits,
    }
    _write_atomically(out_dir / CORPUS_FILE, json.dumps(description, indent=2) + "\n")
    corpus = load_corpus(out_dir)
    progress.note(
        f"{out_dir}: {corpus.name}, {tokenizer.kind} tokenizer, vocabulary {corpus.vocab_size}"
    )
    return corpus


def _write_split(
    out_dir: Path, split: str, source: Source, tokenizer: Tokenizer, progress: PrepareProgress
) -> dict[str, int]:
    documents = source.documents[split]
    num_bytes = sum(document.num_bytes for document in documents)
    progress.stage(split, num_bytes)
    with IndexedWriter(out_dir / split, token_dtype(tokenizer.vocab_size)) as writer:
        for document in documents:
            for piece in document_pieces(document, tokenizer.cut, tokenizer.needs_utf8):
                writer.write(tokenizer.encode(piece))
                progress.advance(len(piece))
            writer.end_document()
    if not writer.num_tokens:
        raise ValueError(f"the {split} split ({num_bytes} bytes) holds no {tokenizer.kind} token")
    return {
        "num_tokens": writer.num_tokens,
        "num_documents": writer.num_documents,
        "num_bytes": num_bytes,
        "bin_bytes": writer.bin_path.stat().st_size,
        "idx_bytes": writer.idx_path.stat().st_size,
    }


def _write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.tmp")
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, path)
