"""How many logits a rank makes of a microbatch, of text or of images."""

from __future__ import annotations

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.parameters import padded_vocab_size


def logits_shape(config: RunConfig, layout: ParallelLayout) -> tuple[int, int]:
    """Rows and columns of a microbatch's logits on one rank: tokens and V / TP; of images, which
    have one answer each and a head that is not cut, images and classes.

    Raises:
        ValueError: when the vocabulary size of a model of text is not known.
    """
    batch = config.train.micro_batch_size
    if config.vision.is_on:
        return batch, config.vision.num_classes
    vocab = padded_vocab_size(config.model) // layout.tensor_model_parallel_size
    return batch * config.model.seq_length, vocab
