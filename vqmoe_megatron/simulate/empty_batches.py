"""What a simulated step reads: the task of a recipe, and batches of its form without content.

b micro batch size, S sequence length, C channels, P pixels of an image's side.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vqmoe_megatron import registry
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.tasks.task import Batch, Task


def task_of(config: RunConfig) -> Task:
    """The recipe's task without a corpus: its loss, and the sums that its report holds."""
    return registry.load("task", config.train.task)(config, corpus=None)


def empty_batches(config: RunConfig) -> Iterator[Batch]:
    """Zeros of one microbatch, again and again: images fp32 ``[b, C, P, P]`` with their labels,
    texts ``[b, S]`` with a label each, or tokens ``[b, S]`` with the next ones."""
    batch, vision = config.train.micro_batch_size, config.vision
    labels = torch.zeros(batch, dtype=torch.int64)
    ids = torch.zeros(batch, config.model.seq_length, dtype=torch.int64)
    texts = {"tokens": ids, "position_ids": ids}
    while True:
        if vision.is_on:
            pixels = torch.zeros(batch, vision.num_channels, vision.image_size, vision.image_size)
            yield {"images": pixels, "labels": labels}
        elif config.finetune.is_on:
            yield {**texts, "labels": labels, "last": labels, "loss_mask": torch.ones(batch)}
        else:
            yield {**texts, "labels": ids, "loss_mask": torch.ones(ids.shape)}
