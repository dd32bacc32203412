"""Classification of images: the class of every image, by cross entropy; scored with accuracy.

b micro batch size, N classes. Every rank reads whole images: the first pipeline stage uses their
pixels, the last their labels. What Megatron counts as tokens of the loss are images.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state

from vqmoe_megatron.data.image_batches import EvaluationImages, TrainingImages
from vqmoe_megatron.tasks.class_loss import NUM_SUMS, class_loss, class_scores
from vqmoe_megatron.tasks.pretrain import to_device
from vqmoe_megatron.tasks.task import Batch, Task


class Images(Task):
    """Batches hold images fp32 ``[b, C, P, P]`` and labels int64 ``[b]``; those of an evaluation
    also ``loss_mask`` fp32 ``[b]``, 1 where an image is scored."""

    num_sums = NUM_SUMS

    def training_iterators(
        self, num_chunks: int, consumed_samples: int, passed_over_samples: int
    ) -> list[Iterator[Batch]]:
        """No communication: the order follows from the seed."""
        config, train = self.config, self.config.train
        num_samples = train.train_iters * train.global_batch_size
        samples = TrainingImages(self.corpus, config.vision, train.seed, num_samples)
        return self.dealt(samples, num_chunks, consumed_samples, passed_over_samples)

    def forward_step(self, iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """Sum the losses of the images; Megatron divides by their number."""
        batch = to_device(next(iterator))
        logits = model(batch["images"])
        mask = batch.get("loss_mask", torch.ones_like(batch["labels"]))
        return logits, partial(class_loss, batch["labels"], mask)

    def evaluation_batches(self) -> EvaluationImages:
        """At most eval_iters microbatches per rank."""
        config = self.config
        return EvaluationImages(
            self.corpus,
            config.data.eval_split,
            seq_length=config.model.seq_length,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            max_images=config.train.eval_iters * config.train.global_batch_size,
        )

    def scores(
        self, loss: float, num_tokens: int, batches: EvaluationImages, num_right: float
    ) -> dict[str, float]:
        """Nats per image, share of images whose class was found. ``num_tokens`` are images."""
        return class_scores(loss, num_tokens, num_right)
