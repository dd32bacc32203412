"""Byte, character and word tokenizers, and the two ways to get any tokenizer: build or load one.

A tokenizer has ``kind``, ``vocab_size``, ``file_name`` (its file in the corpus directory, or None),
``command`` (how it was trained, or None), ``encode(bytes) -> ids [T]``, ``decode(ids) -> bytes``,
``save(directory)``, ``unknown_id`` (the token of what is not in the vocabulary, or None) and
``left_out`` (a line for each kind of text that training passed over). Streaming needs three facts:
``needs_utf8``; ``cut(buffer)``, the number of leading bytes that can be encoded without knowing
what follows (0: read more); and ``train(pieces, vocab_size)``, where ``pieces(split)`` yields the
split cut at such places.

| kind | a token is | outside the vocabulary | decode(encode(text)) |
|---|---|---|---|
| byte | a byte; no end-of-document token | cannot happen | text |
| char | a character of the train split | ``<unk>``, if needed | text, U+FFFD for ``<unk>`` |
| word | a word between ASCII whitespace, or newline: ``<eos>`` | ``<unk>`` | words, single spaces |
| sentencepiece | a learned piece | bytes | text |
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from vqmoe_megatron.data.corpus import content_folder, verify_tokenizer_file
from vqmoe_megatron.data.indexed_writer import token_dtype
from vqmoe_megatron.data.sentencepiece_tokenizer import SentencePieceTokenizer
from vqmoe_megatron.runtime.optional_packages import require

# split name -> the split's text in pieces, each cut where the tokenizer allows
Pieces = Callable[[str], Iterator[bytes]]

NUM_CODE_POINTS = 0x110000
TOKENIZER_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """What every tokenizer offers; see the module docstring."""

    kind: str
    vocab_size: int
    file_name: str | None
    command: str | None
    needs_utf8: bool
    unknown_id: int | None
    left_out: Sequence[str]

    @staticmethod
    def cut(buffer: bytes) -> int:
        """Return how many leading bytes can be encoded on their own; 0: read more."""

    def encode(self, text: bytes) -> np.ndarray:
        """Return the token ids [T] of ``text`` in the narrowest dtype of the vocabulary."""

    def decode(self, ids: np.ndarray) -> bytes:
        """Return the text of ``ids`` [T]."""

    def save(self, directory: Path) -> None:
        """Write the tokenizer's file, if it has one, into ``directory``."""


def _utf8_cut(buffer: bytes) -> int:
    """Return the length of ``buffer`` without a character cut short at its end."""
    for back in range(1, min(4, len(buffer)) + 1):
        byte = buffer[-back]
        if byte >= 0xC0:
            num_bytes = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(buffer) if back >= num_bytes else len(buffer) - back
        if byte < 0x80:
            break
    return len(buffer)


class ByteTokenizer:
    """Token = byte, vocabulary 256. No end-of-document token, no file."""

    kind = "byte"
    vocab_size = 256
    file_name = None
    command = None
    needs_utf8 = False
    unknown_id = None
    left_out = ()

    @classmethod
    def train(cls, pieces: Pieces, vocab_size: int | None) -> ByteTokenizer:
        """Return the tokenizer; nothing is learned."""
        return cls()

    @classmethod
    def load(cls, directory: Path) -> ByteTokenizer:
        """Return the tokenizer; nothing is read."""
        return cls()

    @staticmethod
    def cut(buffer: bytes) -> int:
        """Any place is a good place to cut."""
        return len(buffer)

    def encode(self, text: bytes) -> np.ndarray:
        """Return the bytes as uint8 [T]."""
        return np.frombuffer(text, dtype=np.uint8)

    def decode(self, ids: np.ndarray) -> bytes:
        """Return the bytes; ``ValueError`` for an id outside 0..255."""
        return bytes(np.asarray(ids).tolist())

    def save(self, directory: Path) -> None:
        """Nothing to save."""


class CharTokenizer:
    """Token = character, in code point order over the characters of the train split.

    ``<unk>`` is the last token and exists only when the valid or test split holds a character that
    train does not: text8 has exactly its 27 symbols. Without it, an unseen character is an error.
    """

    kind = "char"
    file_name = TOKENIZER_FILE
    command = None
    needs_utf8 = True
    left_out = ()
    cut = staticmethod(_utf8_cut)

    def __init__(self, characters: str, has_unknown: bool) -> None:
        self.characters = characters
        self.has_unknown = has_unknown
        self.vocab_size = len(characters) + has_unknown
        self.unknown_id = len(characters) if has_unknown else None
        self._code_points = self._to_code_points(characters)
        # [NUM_CODE_POINTS] token id of each code point; -1: not a token
        self._ids = np.full(NUM_CODE_POINTS, len(characters) if has_unknown else -1, np.int32)
        self._ids[self._code_points] = np.arange(len(characters))

    @staticmethod
    def _to_code_points(text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)

    @classmethod
    def train(cls, pieces: Pieces, vocab_size: int | None) -> CharTokenizer:
        """Collect the characters of train, and look in valid and test for others."""
        seen = {}
        for split in ("train", "valid", "test"):
            seen[split] = np.zeros(NUM_CODE_POINTS, dtype=bool)
            for piece in pieces(split):
                seen[split][cls._to_code_points(piece.decode("utf-8"))] = True
        characters = "".join(map(chr, np.flatnonzero(seen["train"])))
        has_unknown = bool(np.any((seen["valid"] | seen["test"]) & ~seen["train"]))
        return cls(characters, has_unknown)

    @classmethod
    def load(cls, directory: Path) -> CharTokenizer:
        """Read the tokenizer back from ``directory``."""
        content = json.loads((directory / cls.file_name).read_text("utf-8"))
        return cls(content["characters"], content["has_unknown"])

    def save(self, directory: Path) -> None:
        """Write the characters to ``tokenizer.json``."""
        content = {"characters": self.characters, "has_unknown": self.has_unknown}
        (directory / self.file_name).write_text(json.dumps(content), "utf-8")

    def encode(self, text: bytes) -> np.ndarray:
        """Return ids [characters]; ``ValueError`` for an unseen character if there is no <unk>."""
        code_points = self._to_code_points(text.decode("utf-8"))
        ids = self._ids[code_points]
        if not self.has_unknown and ids.size and ids.min() < 0:
            character = chr(code_points[np.argmin(ids)])
            raise ValueError(
                f"character {character!r} is not among the {self.vocab_size} characters of this "
                "corpus, whose char tokenizer has no <unk>"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray) -> bytes:
        """Return UTF-8 text, with U+FFFD where the token is <unk>."""
        code_points = np.append(self._code_points, np.uint32(0xFFFD))[np.asarray(ids, np.int64)]
        return code_points.astype("<u4").tobytes().decode("utf-32-le").encode("utf-8")


class WordTokenizer:
    """Token = word, as in WikiText: text between ASCII whitespace, with <eos> for each newline.

    Ids: 0 ``<unk>``, 1 ``<eos>``, then words by falling frequency in train (ties: byte order). A
    literal ``<unk>`` or ``<eos>`` in the text is that token.
    """

    kind = "word"
    file_name = TOKENIZER_FILE
    command = None
    needs_utf8 = True
    unknown_id = 0
    left_out = ()
    special = (b"<unk>", b"<eos>")

    def __init__(self, words: list[bytes]) -> None:
        self.words = words
        self.vocab_size = len(words)
        self._ids = {word: index for index, word in enumerate(words)}

    @staticmethod
    def cut(buffer: bytes) -> int:
        """Cut after the last whitespace."""
        return max(buffer.rfind(space) for space in (b" ", b"\n", b"\t", b"\r", b"\f", b"\v")) + 1

    @classmethod
    def _split(cls, text: bytes) -> list[bytes]:
        return text.replace(b"\n", b" <eos> ").split()

    @classmethod
    def train(cls, pieces: Pieces, vocab_size: int | None) -> WordTokenizer:
        """Count the words of train; keep the most frequent ``vocab_size - 2`` (None: all)."""
        counts: Counter[bytes] = Counter()
        for piece in pieces("train"):
            counts.update(cls._split(piece))
        for word in cls.special:
            counts.pop(word, None)
        by_frequency = sorted(counts, key=lambda word: (-counts[word], word))
        limit = None if vocab_size is None else vocab_size - len(cls.special)
        return cls([*cls.special, *by_frequency[:limit]])

    @classmethod
    def load(cls, directory: Path) -> WordTokenizer:
        """Read the tokenizer back from ``directory``."""
        words = json.loads((directory / cls.file_name).read_text("utf-8"))["words"]
        return cls([word.encode("utf-8") for word in words])

    def save(self, directory: Path) -> None:
        """Write the words to ``tokenizer.json``."""
        content = {"words": [word.decode("utf-8") for word in self.words]}
        (directory / self.file_name).write_text(json.dumps(content, indent=0), "utf-8")

    def encode(self, text: bytes) -> np.ndarray:
        """Return ids [words and newlines]."""
        ids = [self._ids.get(word, 0) for word in self._split(text)]
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray) -> bytes:
        """Return the words, one space between them, a newline for each <eos>."""
        words = [self.words[index] for index in np.asarray(ids).tolist()]
        lines = b" ".join(b"\n" if word == b"<eos>" else word for word in words)
        return lines.replace(b" \n", b"\n").replace(b"\n ", b"\n")


TOKENIZER_CLASSES: dict[str, Any] = {
    cls.kind: cls for cls in (ByteTokenizer, CharTokenizer, WordTokenizer, SentencePieceTokenizer)
}


def check_tokenizer_request(kind: str, vocab_size: int | None) -> None:
    """Raise ``ValueError`` for an unknown kind, one whose package is not installed, or a
    ``vocab_size`` that the kind cannot have."""
    if kind not in TOKENIZER_CLASSES:
        legal = ", ".join(TOKENIZER_CLASSES)
        raise ValueError(f"tokenizer {kind!r} is unknown; choose one of {legal}")
    if kind == SentencePieceTokenizer.kind:
        require("sentencepiece", "a sentencepiece vocabulary")
    if vocab_size is None or (kind == "byte" and vocab_size == ByteTokenizer.vocab_size):
        return
    if kind in ("byte", "char"):
        fixed = "always 256" if kind == "byte" else "the characters of the train split"
        raise ValueError(f"the {kind} tokenizer's vocabulary is {fixed}; leave out --vocab-size")
    if vocab_size < 3:
        raise ValueError(f"--vocab-size {vocab_size} leaves no room for words; give at least 3")


def describe_tokenizer(tokenizer: Tokenizer, directory: Path) -> dict[str, Any]:
    """Return the ``tokenizer`` entry of ``corpus.json`` for a tokenizer saved in ``directory``."""
    file_name = tokenizer.file_name
    digest = hashlib.sha256((directory / file_name).read_bytes()).hexdigest() if file_name else None
    return {
        "kind": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "file": file_name,
        "sha256": digest,
        "command": tokenizer.command,
    }


def load_tokenizer(corpus_dir: Path, description: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer of a prepared corpus; ``description`` is ``Corpus.tokenizer``.

    Raises ``ValueError`` for an unknown kind, a missing file, or one that differs from its sha256.
    """
    check_tokenizer_request(description["kind"], None)
    tokenizer_class = TOKENIZER_CLASSES[description["kind"]]
    folder = content_folder(Path(corpus_dir))
    verify_tokenizer_file(folder, description)
    return tokenizer_class.load(folder)
