"""Labelled texts as batches: tokens, the last position of each text, its class.

b micro batch size, S sequence length.

1. A text is encoded by the checkpoint's tokenizer and cut after S tokens; what follows its last
   token is filled up with token 0. Attention is causal, so nothing at or before the last position
   depends on the filling.
2. Training reads the texts in passes, each in an order of its own that follows from seed and pass:
   sample i is text ``order(i // n)[i % n]`` of n.
3. Evaluation scores every text of a split once, in file order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from vqmoe_megatron.data.labelled_texts import LabelledText, LabelledTexts
from vqmoe_megatron.data.tokenizers import Tokenizer

SPLIT_IN_WORDS = {"train": "train", "valid": "dev", "test": "test"}


class EncodedTexts:
    """A split's texts as token ids.

    Raises ``ValueError`` with its origin for a text that the tokenizer turns into no token.
    """

    def __init__(self, texts: list[LabelledText], tokenizer: Tokenizer) -> None:
        self.tokens = [np.asarray(tokenizer.encode(t.text.encode()), np.int64) for t in texts]
        self.labels = [t.label for t in texts]
        for tokens, text in zip(self.tokens, texts, strict=True):
            if not len(tokens):
                raise ValueError(f"{text.origin}: the tokenizer makes no token of the text")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.tokens))

    @property
    def majority_share(self) -> float:
        """Accuracy of always answering the commonest class."""
        return max(map(self.labels.count, set(self.labels))) / len(self)

    def num_cut(self, seq_length: int) -> int:
        """Texts that are longer than a sample."""
        return sum(len(tokens) > seq_length for tokens in self.tokens)

    def padding_share(self, seq_length: int) -> float:
        """Share of all positions that is filling."""
        used = sum(min(len(tokens), seq_length) for tokens in self.tokens)
        return 1.0 - used / (len(self) * seq_length)

    def sample(self, number: int, seq_length: int) -> dict[str, torch.Tensor]:
        """Text ``number``: tokens and position_ids int64 ``[S]``, labels and last int64 ``[]``,
        loss_mask fp32 ``[]``."""
        found = self.tokens[number][:seq_length]
        tokens = np.zeros(seq_length, np.int64)
        tokens[: len(found)] = found
        return {
            "tokens": torch.from_numpy(tokens),
            "position_ids": torch.arange(seq_length),
            "labels": torch.tensor(self.labels[number]),
            "last": torch.tensor(len(found) - 1),
            "loss_mask": torch.tensor(1.0),
        }


def encode_splits(texts: LabelledTexts, tokenizer: Tokenizer) -> dict[str, EncodedTexts]:
    """Every split as token ids."""
    return {name: EncodedTexts(split, tokenizer) for name, split in texts.splits.items()}


class LabelledSamples(torch.utils.data.Dataset):
    """The ``num_samples`` samples of a run, in the order in which they are trained on."""

    def __init__(self, texts: EncodedTexts, seq_length: int, num_samples: int, seed: int) -> None:
        self.texts, self.seq_length = texts, seq_length
        self.num_samples, self.seed = num_samples, seed
        self._pass, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.num_samples

    def text_of(self, sample: int) -> int:
        """Which text a sample is."""
        number, place = divmod(sample, len(self.texts))
        if number != self._pass:
            generator = np.random.default_rng([self.seed, number])
            self._pass, self._order = number, generator.permutation(len(self.texts))
        return int(self._order[place])

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        return self.texts.sample(self.text_of(sample), self.seq_length)


class LabelledWindows:
    """A split's texts as one data-parallel rank's evaluation microbatches; as EvaluationWindows.

    Microbatch m of rank r holds texts ``(m * D + r) * b + [0, b)``; the last is filled up with
    texts whose mask is zero.
    """

    def __init__(
        self,
        texts: EncodedTexts,
        split: str,
        seq_length: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        self.texts, self.split = texts, split
        self.seq_length, self.micro_batch_size = seq_length, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size

    @property
    def description(self) -> str:
        """What is read and how: '872 texts of dev, each with 272 positions, ...'."""
        return (
            f"{len(self.texts)} texts of {SPLIT_IN_WORDS[self.split]}, each in a window of "
            f"{self.seq_length} tokens, {self.texts.padding_share(self.seq_length):.1%} of them "
            f"filling; {self.texts.num_cut(self.seq_length)} texts cut"
        )

    def __len__(self) -> int:
        return math.ceil(len(self.texts) / (self.micro_batch_size * self.dp_size))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(len(self)):
            first = (number * self.dp_size + self.dp_rank) * self.micro_batch_size
            samples = []
            for text in range(first, first + self.micro_batch_size):
                sample = self.texts.sample(min(text, len(self.texts) - 1), self.seq_length)
                if text >= len(self.texts):
                    sample["loss_mask"] = torch.tensor(0.0)
                samples.append(sample)
            yield {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
