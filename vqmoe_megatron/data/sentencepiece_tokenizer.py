"""A sentencepiece tokenizer that we train on the corpus, set up so that decoding returns the text.

Identity normalisation, no dummy prefix, whitespace kept and byte fallback make it lossless (but for
a literal U+2581, which sentencepiece itself uses for a space). No piece crosses a newline or the
start of a word, so text may be encoded line by line and cut before a space.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_megatron.data.indexed_writer import token_dtype

DEFAULT_VOCAB_SIZE = 8192
MAX_SENTENCE_BYTES = 1024  # longer lines are broken before spaces
WORD_END = re.compile(rb"(?<! ) ")
RESERVED_CHARACTER = "\u2585".encode()
SPACE_MARK = "\u2581".encode()
# BPE: its result does not depend on the number of threads. Sentences times their size bound the
# memory of training.
TRAINING_OPTIONS: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "byte_fallback": True,
    "character_coverage": 0.9995,
    "max_sentence_length": MAX_SENTENCE_BYTES,
    "input_sentence_size": 200_000,
    "shuffle_input_sentence": True,
    "unk_id": 0,
    "bos_id": -1,
    "eos_id": -1,
    "pad_id": -1,
}
TRAINING_SEED = 1234  # for the choice of sentences when there are more than input_sentence_size


def _before_last_spaces(text: bytes, start: int, stop: int) -> int:
    """Return where the last run of spaces in ``text[start:stop]`` begins, ``start`` if nowhere."""
    space = text.rfind(b" ", start, stop)
    while space > start and text[space - 1] == ord(" "):
        space -= 1
    return max(space, start)


def _sentences(line: bytes, breaks_words: bool = False) -> list[str]:
    """Break a line before spaces into sentences that the trainer takes and that encode fast.

    A stretch of ``MAX_SENTENCE_BYTES`` without a space is broken between characters for training
    (``breaks_words``), and stays whole for encoding, where a break would change its tokens.
    """
    sentences = []
    start = 0
    while len(line) - start > MAX_SENTENCE_BYTES:
        limit = start + MAX_SENTENCE_BYTES
        stop = _before_last_spaces(line, start, limit)
        if stop == start and breaks_words:
            stop = next(at for at in range(limit, start, -1) if line[at] & 0xC0 != 0x80)
        elif stop == start:
            following = WORD_END.search(line, limit)
            if following is None:
                break
            stop = following.start()
        sentences.append(line[start:stop].decode("utf-8"))
        start = stop
    sentences.append(line[start:].decode("utf-8"))
    return sentences


class _TrainingText:
    """The sentences of the train split as the trainer takes them, and what it cannot take.

    It drops sentences longer than ``max_sentence_length`` and those with its reserved character,
    without a word, and takes a random choice where there are more than ``input_sentence_size``.
    """

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self.num_sentences = self.num_reserved = self.num_space_marks = 0

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self.num_reserved += piece.count(RESERVED_CHARACTER)
            self.num_space_marks += piece.count(SPACE_MARK)
            for line in re.split(b"\n|" + RESERVED_CHARACTER, piece):
                for sentence in filter(None, _sentences(line, breaks_words=True)):
                    self.num_sentences += 1
                    yield sentence

    @property
    def left_out(self) -> list[str]:
        """One line for every kind of text that the tokenizer has not learned from, or changes."""
        lines = []
        limit = TRAINING_OPTIONS["input_sentence_size"]
        if self.num_sentences > limit:
            lines.append(
                f"sentencepiece is trained on {limit:,} of {self.num_sentences:,} sentences "
                f"({limit / self.num_sentences:.1%} of the train split), chosen at random"
            )
        if self.num_reserved:
            lines.append(
                f"sentencepiece reserves U+2585: the {self.num_reserved:,} in the train split are "
                "left out of training, and are encoded as bytes"
            )
        if self.num_space_marks:
            lines.append(
                f"sentencepiece writes a space as U+2581: the {self.num_space_marks:,} of that "
                "character in the train split become spaces"
            )
        return lines


class SentencePieceTokenizer:
    """Token = sentencepiece BPE piece, with byte fallback. Newline is one token."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"
    needs_utf8 = True
    unknown_id = 0  # only if byte fallback fails

    def __init__(
        self, model: bytes, command: str | None = None, left_out: list[str] | None = None
    ) -> None:
        self.model = model
        self.command = command
        self.left_out = left_out or []
        import sentencepiece

        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = self._processor.vocab_size()
        self._newline = self._processor.piece_to_id("<0x0A>")

    @property
    def pieces(self) -> list[tuple[str, float]]:
        """Every piece with its score, by id."""
        of = self._processor
        return [(of.id_to_piece(i), of.get_score(i)) for i in range(self.vocab_size)]

    @staticmethod
    def cut(buffer: bytes) -> int:
        """Cut after the last newline, or else before the last run of spaces."""
        newline = buffer.rfind(b"\n")
        if newline >= 0:
            return newline + 1
        return _before_last_spaces(buffer, 0, len(buffer))

    @classmethod
    def train(
        cls, pieces: Callable[[str], Iterator[bytes]], vocab_size: int | None
    ) -> SentencePieceTokenizer:
        """Train on the train split; ``ValueError`` if it cannot support ``vocab_size``."""
        import sentencepiece

        options = {**TRAINING_OPTIONS, "vocab_size": vocab_size or DEFAULT_VOCAB_SIZE}
        command = " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
        model = io.BytesIO()
        text = _TrainingText(pieces("train"))
        sentencepiece.set_random_generator_seed(TRAINING_SEED)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(text),
                model_writer=model,
                minloglevel=2,
                **options,
            )
        except RuntimeError as error:
            raise ValueError(
                f"sentencepiece cannot train --vocab-size {options['vocab_size']} on this text "
                f"(byte fallback and characters need 300 or more, small texts support few): {error}"
            ) from error
        return cls(
            model.getvalue(),
            f"spm_train {command} (sentencepiece {sentencepiece.__version__}, "
            f"random seed {TRAINING_SEED}, sentences: lines of the train split)",
            text.left_out,
        )

    @classmethod
    def load(cls, directory: Path) -> SentencePieceTokenizer:
        """Read the tokenizer back from ``directory``."""
        return cls((directory / cls.file_name).read_bytes())

    def save(self, directory: Path) -> None:
        """Write the model to ``tokenizer.model``."""
        (directory / self.file_name).write_bytes(self.model)

    def encode(self, text: bytes) -> np.ndarray:
        """Return ids [pieces]."""
        lines = [_sentences(line) for line in text.split(b"\n")]
        # One call: each starts the library's threads anew.
        encoded = iter(self._processor.encode(list(chain.from_iterable(lines))))
        ids: list[int] = []
        for number, sentences in enumerate(lines):
            if number:
                ids.append(self._newline)
            for _ in sentences:
                ids.extend(next(encoded))
        return np.array(ids, dtype=token_dtype(self.vocab_size))

    def decode(self, ids: np.ndarray) -> bytes:
        """Return UTF-8 text."""
        return self._processor.decode(np.asarray(ids).tolist()).encode("utf-8")
