"""The shape of what a model says: logits of tokens, of texts or of images."""

from __future__ import annotations

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.ends import num_head_classes
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.parameters import padded_vocab_size


def logits_shape(config: RunConfig, layout: ParallelLayout) -> tuple[int, int]:
    """Rows and columns of a microbatch's logits on one rank: tokens and V / TP; classes where a
    head tells them apart; images have one answer each, texts an unused one at every position."""
    batch, num_columns = config.train.micro_batch_size, num_head_classes(config)
    if num_columns is None:
        num_columns = padded_vocab_size(config.model) // layout.tensor_model_parallel_size
    return (batch if config.vision.is_on else batch * config.model.seq_length), num_columns
