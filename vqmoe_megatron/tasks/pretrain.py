"""Pretraining: the next token of a corpus, everywhere; scored on strided windows.

With Transformer-XL's attention batches are parallel streams of the corpus, in evaluation too.

S sequence length, b micro batch size. Every rank reads whole sequences; context-parallel ranks cut
their part out of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from vqmoe_megatron.data.corpus import current_corpus
from vqmoe_megatron.data.datasets import build_training_dataset
from vqmoe_megatron.data.evaluation_windows import EvaluationWindows, bits_per_byte, perplexity
from vqmoe_megatron.data.sample_order import cache_folders
from vqmoe_megatron.data.text_streams import EvaluationStreams, StreamRows, training_streams
from vqmoe_megatron.runtime.versions import batch_on_this_cp_rank
from vqmoe_megatron.tasks.task import Batch, Task


class Pretrain(Task):
    """Batches hold tokens, labels, position_ids int64 and loss_mask fp32, each ``[b, S]``."""

    cuts_sequences = True
    reads_streams = True

    def training_iterators(
        self, num_chunks: int, consumed_samples: int, passed_over_samples: int
    ) -> list[Iterator[Batch]]:
        """Communicates: a barrier while rank 0 builds the sample order; streams need none."""
        config, train = self.config, self.config.train
        if self._are_streams:
            rows, num_read = self._rows("train"), consumed_samples + passed_over_samples
            return [
                training_streams(rows, num_read, torch.cuda.is_available())
                for _ in range(num_chunks)
            ]
        dataset = build_training_dataset(
            self.corpus,
            seq_length=config.model.seq_length,
            num_samples=train.train_iters * train.global_batch_size,
            seed=train.seed,
            cache_dirs=cache_folders(self.corpus, config.data.cache_dir, Path(train.output_dir)),
        )
        return self.dealt(dataset, num_chunks, consumed_samples, passed_over_samples)

    def forward_step(self, iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """Sum the token losses under the mask; Megatron divides by the token count."""
        whole = to_device(next(iterator))
        batch = batch_on_this_cp_rank(whole)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        num_parts = parallel_state.get_context_parallel_world_size()
        if num_parts == 1 or self.config.model.calculate_per_token_loss:
            return output, partial(masked_loss, batch["loss_mask"])
        return output, partial(part_of_mean_loss, batch["loss_mask"], whole["loss_mask"], num_parts)

    def evaluation_batches(self) -> EvaluationWindows | EvaluationStreams:
        """At most eval_iters microbatches per rank, of streams eval_iters segments of each row."""
        config = self.config
        if self._are_streams:
            split = current_corpus(self.corpus).split(config.data.eval_split)
            streams = EvaluationStreams(
                split,
                self._rows(config.data.eval_split),
                config.model.memory_length_tokens,
                config.train.eval_iters,
            )
            current_corpus(self.corpus)
            return streams
        windows = EvaluationWindows(
            current_corpus(self.corpus).split(config.data.eval_split),
            seq_length=config.model.seq_length,
            stride_tokens=config.data.eval_stride_tokens,
            window_tokens=config.data.eval_window_tokens,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            max_windows=config.train.eval_iters * config.train.global_batch_size,
        )
        current_corpus(self.corpus)
        return windows

    @property
    def _are_streams(self) -> bool:
        return self.config.model.attention == "transformer_xl"

    def _rows(self, split: str) -> StreamRows:
        return StreamRows(
            current_corpus(self.corpus).split(split),
            self.config.model.seq_length,
            self.config.train.global_batch_size,
            self.config.train.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )

    def scores(
        self, loss: float, num_tokens: int, batches: EvaluationWindows | EvaluationStreams
    ) -> dict[str, float]:
        """Nats per token, bits per byte of the text, perplexity."""
        return {
            "val/loss": loss / num_tokens,
            "val/bits_per_byte": bits_per_byte(loss, num_tokens, batches.num_scored_bytes),
            "val/perplexity": perplexity(loss, num_tokens),
        }


def masked_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> tuple[Any, ...]:
    """Sum the token losses [b, S] under the mask, and count its tokens."""
    mask = loss_mask.reshape(-1).float()
    total = (losses.reshape(-1).float() * mask).sum()
    num_tokens = mask.sum()
    report = torch.stack([total.detach().double(), num_tokens.double()])
    return total, num_tokens.to(torch.int), {"loss": report}


def part_of_mean_loss(
    loss_mask: torch.Tensor, whole_mask: torch.Tensor, num_parts: int, losses: torch.Tensor
) -> tuple[Any, ...]:
    """What a context-parallel rank gives of its microbatch's mean, whatever the mask is.

    Megatron divides by the count that it is told, and then takes the mean over ``num_parts`` ranks;
    so it is told the whole mask's, and ``num_parts`` times this rank's sum. The report is of this
    rank. No communication.
    """
    total, _, report = masked_loss(loss_mask, losses)
    return total * num_parts, whole_mask.sum().to(torch.int), report


def to_device(batch: Batch) -> Batch:
    """Move a batch to this rank's device."""
    device = torch.cuda.current_device()
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
