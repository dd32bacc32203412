"""The text that models are analysed on: windows of a corpus, what tokens say, parts of speech.

T tokens, S tokens per window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from vqmoe_megatron.analysis.python_classes import CLASSES, UNKNOWN, byte_classes
from vqmoe_megatron.analysis.tags import read_tags
from vqmoe_megatron.data.corpus import Corpus
from vqmoe_megatron.data.evaluation_windows import EvaluationWindows
from vqmoe_megatron.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from vqmoe_megatron.tasks.task import Batch

MICRO_BATCH_SIZES = (8, 4, 2, 1)  # the first that divides the windows: no row is empty


@dataclass(frozen=True)
class Text:
    """Evenly spread windows of one split, the same for every model of one ``seq_length``."""

    corpus: Corpus
    split: str
    seq_length: int
    num_tokens: int  # wanted; whole windows that fill microbatches are read

    @cached_property
    def windows(self) -> EvaluationWindows:
        """In microbatches without empty rows."""
        whole = EvaluationWindows(self.corpus.split(self.split), self.seq_length)
        num_windows = math.ceil(self.num_tokens / self.seq_length)
        if num_windows > MICRO_BATCH_SIZES[0]:
            num_windows += -num_windows % MICRO_BATCH_SIZES[0]
        num_windows = min(whole.num_windows, num_windows)
        size = next(size for size in MICRO_BATCH_SIZES if num_windows % size == 0)
        return EvaluationWindows(
            self.corpus.split(self.split),
            self.seq_length,
            micro_batch_size=size,
            max_windows=num_windows,
        )

    def batches(self) -> Iterator[Batch]:
        """All of them, from the start."""
        return iter(self.windows)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The corpus'."""
        return load_tokenizer(self.corpus.path, self.corpus.tokenizer)

    @cached_property
    def all_tokens(self) -> np.ndarray:
        """The whole split, mapped."""
        split = self.corpus.split(self.split)
        return np.memmap(split.bin_path, dtype=split.token_dtype, mode="r")

    def places(self, window: torch.Tensor, place: torch.Tensor) -> np.ndarray:
        """Where in the split tokens lie, int64 ``[T]``, by their window and place in it."""
        return self.windows.first_tokens[window.numpy()] + place.numpy()

    def say(self, ids: np.ndarray) -> str:
        """Tokens as a person reads them."""
        return self.tokenizer.decode(np.asarray(ids)).decode("utf-8", errors="replace")


@dataclass(frozen=True)
class PartsOfSpeech:
    """A class for every token of a split, or why there is none."""

    names: tuple[str, ...]
    classes: np.ndarray | None  # int64 [tokens of the split]; UNKNOWN: none
    said: str  # where they come from, or why there are none


def parts_of_speech(text: Text, places: np.ndarray, tags: Path | None) -> PartsOfSpeech:
    """Classes of the tokens at ``places`` of the split (of others they may be ``UNKNOWN``).

    ``tags``: a file with one tag per line for every token of the split; without it Python's own
    tokenizer is asked about the corpus ``stdlib`` in bytes.

    Raises:
        ValueError: as :func:`read_tags`.
    """
    if tags is not None:
        return _from_file(text, tags)
    if text.corpus.name != "stdlib":
        return PartsOfSpeech(
            (),
            None,
            f"Part of speech: not computed. {text.corpus.path} is natural text or unknown source, "
            "and no tagger comes with this package; --tags FILE gives one tag per line for every "
            f"token of split {text.split}",
        )
    if text.corpus.tokenizer["kind"] != ByteTokenizer.kind:
        return PartsOfSpeech(
            (),
            None,
            "Part of speech: not computed. Python's tokenizer speaks of bytes, and a token of the "
            f"{text.corpus.tokenizer['kind']} tokenizer may span several classes; --tags FILE "
            f"gives one tag per line for every token of split {text.split}",
        )
    return _of_python(text, places)


def _from_file(text: Text, tags: Path) -> PartsOfSpeech:
    lines = read_tags(tags, text.corpus, text.split)
    names, classes = np.unique(np.array(lines), return_inverse=True)
    return PartsOfSpeech(
        tuple(map(str, names)), classes.astype(np.int64), f"Part of speech: tags of {tags.name}."
    )


def _of_python(text: Text, places: np.ndarray) -> PartsOfSpeech:
    classes = np.full(len(text.all_tokens), UNKNOWN, dtype=np.int64)
    documents = IndexedDataset(str(text.corpus.split(text.split).prefix))
    lengths = documents.sequence_lengths.astype(np.int64)  # a copy: theirs ends with the file
    ends = np.cumsum(lengths)
    for document in np.unique(np.searchsorted(ends, places, side="right")):
        first, last = int(ends[document] - lengths[document]), int(ends[document])
        classes[first:last] = byte_classes(text.all_tokens[first:last].astype(np.uint8).tobytes())
    share = float((classes[places] != UNKNOWN).mean())
    return PartsOfSpeech(
        CLASSES,
        classes,
        f"Part of speech: the class that Python's own tokenizer gives a byte ({', '.join(CLASSES)})"
        f"; {share:.0%} of the tokens lie in files that it reads, others are left out.",
    )
