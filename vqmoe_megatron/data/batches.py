"""Bind the data floor to this rank's place in the layout.

S sequence length, b micro batch size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core import parallel_state

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.data.corpus import Corpus, current_corpus
from vqmoe_megatron.data.datasets import TrainBatches, build_training_dataset
from vqmoe_megatron.data.evaluation_windows import EvaluationWindows
from vqmoe_megatron.data.sample_order import cache_folders

Batch = dict[str, torch.Tensor]  # tokens, labels, position_ids int64, loss_mask fp32, each [b, S]


def training_iterators(
    config: RunConfig,
    corpus: Corpus,
    consumed_samples: int,
    num_chunks: int,
    passed_over_samples: int,
) -> list[Iterator[Batch]]:
    """One iterator per model chunk, each from the sample after the consumed and passed over ones.

    Interleaved pipeline chunks read the same microbatches in their own order, so each has its own
    iterator. Communicates: a barrier while rank 0 builds the sample order.
    """
    train = config.train
    dataset = build_training_dataset(
        corpus,
        seq_length=config.model.seq_length,
        num_samples=train.train_iters * train.global_batch_size,
        seed=train.seed,
        cache_dirs=cache_folders(corpus, config.data.cache_dir, Path(train.output_dir)),
    )
    batches = TrainBatches(
        dataset,
        consumed_samples=consumed_samples,
        passed_over_samples=passed_over_samples,
        micro_batch_size=train.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        num_workers=config.data.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
    return [iter(batches) for _ in range(num_chunks)]


def evaluation_windows(config: RunConfig, corpus: Corpus) -> EvaluationWindows:
    """This rank's share of the evaluation split: at most eval_iters microbatches per rank.

    Raises ``ValueError`` when the corpus was replaced since it was loaded.
    """
    dp_size = parallel_state.get_data_parallel_world_size()
    batch = config.train.micro_batch_size
    windows = EvaluationWindows(
        current_corpus(corpus).split(config.data.eval_split),
        seq_length=config.model.seq_length,
        stride_tokens=config.data.eval_stride_tokens,
        micro_batch_size=batch,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=dp_size,
        max_windows=config.train.eval_iters * config.train.global_batch_size,
    )
    current_corpus(corpus)
    return windows


def to_device(batch: Batch) -> Batch:
    """Move a batch to this rank's device."""
    device = torch.cuda.current_device()
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


class TimedIterator:
    """An iterator that knows how long its consumer waited for it."""

    def __init__(self, iterator: Iterator[Batch]) -> None:
        self._iterator = iterator
        self._seconds = 0.0

    def __iter__(self) -> TimedIterator:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._iterator)
        self._seconds += time.perf_counter() - started
        return batch

    def take_seconds(self) -> float:
        """Return the seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
