"""``vqmoe prepare``: text in, a corpus directory out, in memory that does not grow with the text.

1. Check the request and what is in the directory; nothing is written where it is refused.
2. Take the directory's lock; find, verify and split the text (corpora.py).
3. Build the tokenizer from the train split, in one or more passes of pieces of about 64 KiB.
4. Per split: encode piece by piece into ``SPLIT.bin``, then write ``SPLIT.idx``.
5. Write ``corpus.json``. All of it happens aside; the whole corpus then takes its place
   (corpus_folder.py), and until then an older one stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_megatron.data.corpora import (
    KNOWN_TEXTS,
    Source,
    archive_name,
    check_corpus_request,
    open_source,
)
from vqmoe_megatron.data.corpus import (
    CORPUS_FILE,
    FORMAT_VERSION,
    SPLITS,
    Corpus,
    load_corpus,
    read_description,
    split_files,
)
from vqmoe_megatron.data.corpus_folder import (
    building_folder,
    check_out_folder,
    check_outputs,
    check_replaceable,
    finish_interrupted,
    put_in_place,
)
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

UNPACK_DIR = "unpacked"


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
    can cause, and then leaves the directory as it was; the network is used only with ``download``.
    Does not communicate.
    """
    out_dir, inputs = Path(out_dir), [Path(path) for path in inputs]
    check_corpus_request(corpus, inputs, download)
    check_tokenizer_request(tokenizer, vocab_size)
    if tokenizer == "word" and vocab_size is None and corpus in RELEASED_CORPORA:
        vocab_size = RELEASED_CORPORA[corpus].word_vocab_size
    request = {"corpus": corpus, "tokenizer": tokenizer, "vocab_size": vocab_size}
    keep_characters = TOKENIZER_CLASSES[tokenizer].needs_utf8
    with _explained(out_dir), PrepareProgress() as progress:
        check_out_folder(out_dir, inputs, archive_name(corpus))
        finish_interrupted(out_dir, progress)
        before = read_description(out_dir)
        existing = None if overwrite or not before else _existing_corpus(out_dir, progress)
        if existing is not None:
            source = None  # a known text can only be the one with the recorded digest
            if corpus not in RELEASED_CORPORA and (corpus not in KNOWN_TEXTS or inputs):
                source = open_source(corpus, inputs, None, keep_characters, out_dir)
            _check_same_request(existing, request, source)
            progress.note(f"{out_dir} already holds this corpus; nothing to do")
            return existing
        with building_folder(out_dir, progress) as building:
            if read_description(out_dir) != before:
                raise ValueError(f"another prepare was writing to {out_dir}; start this one again")
            download_dir, unpack_dir = out_dir if download else None, building / UNPACK_DIR
            source = open_source(corpus, inputs, download_dir, keep_characters, unpack_dir)
            check_outputs(out_dir, _output_names(source, tokenizer))
            for line in source.notices:
                progress.note(line)
            _write_corpus(building / "corpus", request, source, progress)
            put_in_place(building / "corpus", out_dir)
        written = load_corpus(out_dir)
        progress.note(
            f"{out_dir}: {written.name}, {tokenizer} tokenizer, vocabulary {written.vocab_size}"
        )
        return written


def _output_names(source: Source, tokenizer: str) -> list[str]:
    names = [name for split in source.documents for name in split_files(split)]
    tokenizer_file = TOKENIZER_CLASSES[tokenizer].file_name
    return [CORPUS_FILE, *names, *([tokenizer_file] if tokenizer_file else [])]


@contextmanager
def _explained(out_dir: Path) -> Iterator[None]:
    """Turn what the file system refuses into a ``ValueError``."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot prepare a corpus in {out_dir}: {error}") from error


def _existing_corpus(out_dir: Path, progress: PrepareProgress) -> Corpus | None:
    """Return the corpus of ``out_dir``; None for a damaged one of which nothing can be lost."""
    try:
        return load_corpus(out_dir)
    except ValueError as error:
        check_replaceable(out_dir, error)
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
    corpus_dir: Path, request: dict[str, Any], source: Source, progress: PrepareProgress
) -> None:
    """Steps 3 to 5."""
    corpus_dir.mkdir()
    tokenizer_class = TOKENIZER_CLASSES[request["tokenizer"]]

    def pieces(split: str) -> Iterator[bytes]:
        documents = source.documents.get(split, [])
        progress.stage(f"tokenizer: {split}", sum(document.num_bytes for document in documents))
        for document in documents:
            for piece in document_pieces(document, tokenizer_class.cut, tokenizer_class.needs_utf8):
                yield piece
                progress.advance(len(piece))

    tokenizer = tokenizer_class.train(pieces, request["vocab_size"])
    for line in tokenizer.left_out:
        progress.note(line)
    tokenizer.save(corpus_dir)
    splits = {
        split: _write_split(corpus_dir, split, source, tokenizer, progress)
        for split in SPLITS
        if split in source.documents
    }
    description = {
        "format_version": FORMAT_VERSION,
        "corpus": request["corpus"],
        "request": request,
        "source": source.description,
        "tokenizer": describe_tokenizer(tokenizer, corpus_dir),
        "token_dtype": token_dtype(tokenizer.vocab_size),
        "splits": splits,
    }
    text = json.dumps(description, indent=2) + "\n"
    (corpus_dir / CORPUS_FILE).write_text(text, encoding="utf-8")


def _write_split(
    corpus_dir: Path, split: str, source: Source, tokenizer: Tokenizer, progress: PrepareProgress
) -> dict[str, int]:
    documents = source.documents[split]
    num_bytes = sum(document.num_bytes for document in documents)
    num_unknown = 0
    progress.stage(split, num_bytes)
    with IndexedWriter(corpus_dir / split, token_dtype(tokenizer.vocab_size)) as writer:
        for document in documents:
            for piece in document_pieces(document, tokenizer.cut, tokenizer.needs_utf8):
                ids = tokenizer.encode(piece)
                writer.write(ids)
                num_unknown += int(np.count_nonzero(ids == tokenizer.unknown_id))
                progress.advance(len(piece))
            writer.end_document()
    if not writer.num_tokens:
        raise ValueError(f"the {split} split ({num_bytes} bytes) holds no {tokenizer.kind} token")
    if num_unknown:
        progress.note(
            f"{split}: {num_unknown:,} of {writer.num_tokens:,} tokens "
            f"({num_unknown / writer.num_tokens:.2%}) are <unk>: not in the vocabulary, or written "
            "so in the text"
        )
    return {
        "num_tokens": writer.num_tokens,
        "num_documents": writer.num_documents,
        "num_bytes": num_bytes,
        "bin_bytes": writer.bin_path.stat().st_size,
        "idx_bytes": writer.idx_path.stat().st_size,
    }
