"""Fine-tuning: the class of a text, read off the last of its tokens; scored by accuracy.

b micro batch size, S sequence length, G classes.

The model's output layer is a classification head (``engines/megatron/classification_head.py``),
so its output are class logits ``[b, S, G]``; those of a text's last token count, whatever stands
behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.data.corpus import Corpus
from vqmoe_megatron.data.labelled_samples import (
    EncodedTexts,
    LabelledSamples,
    LabelledWindows,
    encode_splits,
)
from vqmoe_megatron.data.labelled_texts import checked_texts
from vqmoe_megatron.data.tokenizers import load_tokenizer
from vqmoe_megatron.tasks.class_loss import NUM_SUMS, class_loss, class_scores
from vqmoe_megatron.tasks.pretrain import to_device
from vqmoe_megatron.tasks.task import Batch, Task


class Finetune(Task):
    """Batches hold tokens and position_ids int64 ``[b, S]``, labels and last int64 ``[b]``, and
    loss_mask fp32 ``[b]``."""

    num_sums = NUM_SUMS

    def __init__(self, config: RunConfig, corpus: Corpus | None) -> None:
        super().__init__(config, corpus)
        self._splits: dict[str, EncodedTexts] | None = None

    @property
    def splits(self) -> dict[str, EncodedTexts]:
        """The encoded splits; read when first asked for."""
        if self._splits is None:
            texts = checked_texts(self.config.finetune)
            tokenizer = load_tokenizer(self.corpus.path, self.corpus.tokenizer)
            self._splits = encode_splits(texts, tokenizer)
        return self._splits

    def training_iterators(
        self, num_chunks: int, consumed_samples: int, passed_over_samples: int
    ) -> list[Iterator[Batch]]:
        """No communication: every rank reads the texts."""
        config, train = self.config, self.config.train
        samples = LabelledSamples(
            self.splits["train"],
            config.model.seq_length,
            train.train_iters * train.global_batch_size,
            train.seed,
        )
        return self.dealt(samples, num_chunks, consumed_samples, passed_over_samples)

    def forward_step(self, iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """Sum the cross-entropy of the texts; Megatron divides by their number."""
        batch = to_device(next(iterator))
        output = model(batch["tokens"], batch["position_ids"], None)
        return output, partial(last_token_loss, batch)

    def evaluation_batches(self) -> LabelledWindows:
        """All texts of the split, whatever ``train.eval_iters`` says."""
        split = self.config.data.eval_split
        if split not in self.splits:
            raise ValueError(f"{self.config.finetune.path} has no {split} split to evaluate")
        return LabelledWindows(
            self.splits[split],
            split,
            self.config.model.seq_length,
            self.config.train.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )

    def scores(
        self, loss: float, num_tokens: int, batches: LabelledWindows, num_right: float
    ) -> dict[str, float]:
        """Nats per text, share of texts whose class was found. ``num_tokens`` are texts."""
        return class_scores(loss, num_tokens, num_right)


def last_token_loss(batch: Batch, logits: torch.Tensor) -> tuple[Any, ...]:
    """:func:`class_loss` of class logits ``[b, S, G]`` at each text's last token."""
    rows = torch.arange(logits.shape[0], device=logits.device)
    return class_loss(batch["labels"], batch["loss_mask"], logits[rows, batch["last"]])
