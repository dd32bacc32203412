"""What a task is: what a batch is, what its loss is, how a model is scored.

S sequence length, b micro batch size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.data.corpus import Corpus
from vqmoe_megatron.data.datasets import TrainBatches
from vqmoe_megatron.data.evaluation_windows import EvaluationWindows
from vqmoe_megatron.data.text_streams import EvaluationStreams

Batch = dict[str, torch.Tensor]


class Task(ABC):
    """Built on every rank with the checked recipe, and the corpus if its batches are read."""

    # Whether forward_step gives the model this context-parallel rank's part of a batch, as
    # Megatron's get_batch_on_this_cp_rank cuts it; without, context parallelism is refused.
    cuts_sequences = False
    # Numbers in a report: summed loss, scored tokens, and what `scores` takes beside them.
    num_sums = 2

    # Whether, with model.attention=transformer_xl, row r of every global batch goes on where row r
    # of the last one ended; without, a model with that attention is refused.
    reads_streams = False

    def __init__(self, config: RunConfig, corpus: Corpus | None) -> None:
        self.config = config
        self.corpus = corpus

    @abstractmethod
    def training_iterators(
        self, num_chunks: int, consumed_samples: int, passed_over_samples: int
    ) -> list[Iterator[Batch]]:
        """One iterator of this rank's microbatches per model chunk.

        Interleaved pipeline chunks read the same microbatches in their own order. A resumed run
        asks for what comes after so many samples, and must get what it would have got.
        """

    def dealt(
        self, samples: Any, num_chunks: int, consumed_samples: int, passed_over_samples: int
    ) -> list[Iterator[Batch]]:
        """What :meth:`training_iterators` returns, of samples that :class:`TrainBatches` can deal:
        with ``num_samples``, by number. No communication."""
        train = self.config.train
        batches = TrainBatches(
            samples,
            consumed_samples=consumed_samples,
            passed_over_samples=passed_over_samples,
            micro_batch_size=train.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            num_workers=self.config.data.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return [iter(batches) for _ in range(num_chunks)]

    @abstractmethod
    def forward_step(self, iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """Evaluate one microbatch, in the shape that Megatron's schedules expect.

        Returns:
            The model's output, and a function of it that returns ``(summed loss, number of scored
            tokens int32, {"loss": fp64 [num_sums]})``, the last both again, detached.
        """

    @abstractmethod
    def evaluation_batches(self) -> EvaluationWindows | EvaluationStreams:
        """This rank's share of the evaluation split; ``description`` says what it is.

        Raises ``ValueError`` when the corpus was replaced since it was loaded.
        """

    @abstractmethod
    def scores(
        self, loss: float, num_tokens: int, batches: EvaluationWindows | EvaluationStreams
    ) -> dict[str, float]:
        """Metrics of the evaluation split by name, of its summed loss and scored tokens."""
