"""What models have where one that predicts tokens has its vocabulary, whole on every tensor rank.

H hidden size, C P P numbers of a patch, S patches, N classes. Name, part and shape of each tensor,
in the order of the model.
"""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.config import RunConfig

Tensor = tuple[str, str, tuple[int, ...]]


def patch_tensors(config: RunConfig) -> Iterator[Tensor]:
    """On the first chunk: the projection [H, C P P] with its bias, and positions [S, H]."""
    hidden, vision = config.model.hidden_size, config.vision
    yield "embedding.patch_projection.weight", "patches", (hidden, vision.patch_width)
    yield "embedding.patch_projection.bias", "patches", (hidden,)
    yield "embedding.position_embeddings.weight", "patches", (vision.num_patches, hidden)


def num_head_classes(config: RunConfig) -> int | None:
    """N of a model of images or a fine-tuned one; None where the model predicts tokens."""
    if config.vision.is_on:
        return config.vision.num_classes
    return (config.finetune.num_classes or 0) if config.finetune.is_on else None


def head_tensors(config: RunConfig) -> Iterator[Tensor]:
    """On the last: the head [N, H] with its bias; nothing where the model predicts tokens."""
    if (num_classes := num_head_classes(config)) is not None:
        yield "output_layer.weight", "output_layer", (num_classes, config.model.hidden_size)
        yield "output_layer.bias", "output_layer", (num_classes,)
