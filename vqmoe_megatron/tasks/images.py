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

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.data.datasets import TrainBatches
from vqmoe_megatron.data.image_batches import EvaluationImages, TrainingImages
from vqmoe_megatron.data.image_set import ImageSet
from vqmoe_megatron.tasks.pretrain import to_device
from vqmoe_megatron.tasks.task import Batch, Task


class Images(Task):
    """Batches hold images fp32 ``[b, C, P, P]`` and labels int64 ``[b]``; those of an evaluation
    also ``loss_mask`` fp32 ``[b]``, 1 where an image is scored."""

    def __init__(self, config: RunConfig, corpus: ImageSet | None) -> None:
        super().__init__(config, corpus)
        # Of the evaluation under way: scored images whose most likely class is right.
        self._num_right = torch.zeros((), device=torch.cuda.current_device())

    def training_iterators(
        self, num_chunks: int, consumed_samples: int, passed_over_samples: int
    ) -> list[Iterator[Batch]]:
        """No communication: the order follows from the seed."""
        config, train = self.config, self.config.train
        num_samples = train.train_iters * train.global_batch_size
        batches = TrainBatches(
            TrainingImages(self.corpus, config.vision, train.seed, num_samples),
            consumed_samples=consumed_samples,
            passed_over_samples=passed_over_samples,
            micro_batch_size=train.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
            num_workers=config.data.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return [iter(batches) for _ in range(num_chunks)]

    def forward_step(self, iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Any, Any]:
        """Sum the losses of the images; Megatron divides by their number."""
        batch = to_device(next(iterator))
        logits = model(batch["images"])
        if "loss_mask" in batch:
            return logits, partial(self._evaluated, batch)
        return logits, partial(class_loss, batch["labels"], torch.ones_like(batch["labels"]))

    def _evaluated(self, batch: Batch, logits: torch.Tensor) -> tuple[Any, ...]:
        self._num_right += num_right(batch["labels"], batch["loss_mask"], logits)
        return class_loss(batch["labels"], batch["loss_mask"], logits)

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

    def scores(self, loss: float, num_tokens: int, batches: EvaluationImages) -> dict[str, float]:
        """Nats per image, and the share of images whose most likely class is right.

        Communicates one all-reduce over the world: tensor-parallel ranks of the last stage have
        counted the same images, the first of them says how many.
        """
        right = self._num_right.clone()
        self._num_right.zero_()
        if parallel_state.get_tensor_model_parallel_rank() > 0:
            right.zero_()
        torch.distributed.all_reduce(right)
        return {"val/loss": loss / num_tokens, "val/accuracy": float(right) / num_tokens}


def class_loss(
    labels: torch.Tensor, mask: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum the cross entropies, in fp32, of logits [b, N] under the mask [b], and count it."""
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    total, num_images = (losses * mask).sum(), mask.sum()
    report = torch.stack([total.detach().double(), num_images.double()])
    return total, num_images.to(torch.int), {"loss": report}


def num_right(labels: torch.Tensor, mask: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Number of images under the mask whose largest logit is their label's; fp32 scalar."""
    return ((logits.argmax(dim=-1) == labels) * mask).sum()
