"""What a model of images cannot do, and why: settings of text, and what was never tried."""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.router_rules import OF_TOKEN_IDS

TASK = "images"  # the task that reads images, and no other
NO_TOKEN_IDS = "an image has no token ids"
# Settings of text that a recipe must leave out: key -> value where it does, and why.
OF_TEXT = {
    "model.vocab_size": (None, f"{NO_TOKEN_IDS}, the head has vision.num_classes outputs"),
    "model.untie_embeddings_and_output_weights": (True, "patches and classes share no weights"),
    "data.eval_window_tokens": (None, "an image is read whole"),
    "data.eval_stride_tokens": (None, "every image is scored once"),
    "data.cache_dir": (None, "the order of images follows from the seed, nothing is kept of it"),
    "code_memory.num_rows": (0, f"rows are found by token ids, and {NO_TOKEN_IDS}"),
    "checkpoint.remap": (False, "it was never tried with a model of images"),
}


def vision_errors(config: RunConfig) -> Iterator[str]:
    """Yield every rule between the section ``vision`` and the others that the recipe breaks."""
    vision, model, train = config.vision, config.model, config.train
    if not vision.is_on:
        if train.task == TASK:
            yield f"train.task={TASK} needs vision.image_size, pixels of height and width; set it"
        return
    if train.task != TASK:
        yield (
            f"vision.image_size={vision.image_size} with train.task={train.task}: only "
            f"train.task={TASK} reads images; set it, or leave vision.image_size out"
        )
    if model.seq_length != vision.num_patches:
        yield (
            "seq_length = (image_size / patch_size)^2 fails: "
            f"{model.seq_length} != ({vision.image_size} / {vision.patch_size})^2 = "
            f"{vision.num_patches}; set model.seq_length={vision.num_patches}, one position for "
            "every patch"
        )
    if model.position_embedding_type != "learned_absolute":
        yield (
            f"position_embedding_type={model.position_embedding_type} with vision.image_size: "
            "patches lie in a square, and have learned positions; use learned_absolute"
        )
    for key, (unset, reason) in OF_TEXT.items():
        section, _, name = key.partition(".")
        if (value := getattr(getattr(config, section), name)) != unset:
            yield f"{key}={value} with vision.image_size: {reason}; leave it out"
    if model.moe_router in OF_TOKEN_IDS:
        yield (
            f"moe_router={model.moe_router} with vision.image_size: it routes by token ids, and "
            f"{NO_TOKEN_IDS}; use topk"
        )
    if model.calculate_per_token_loss:
        yield (
            "calculate_per_token_loss with vision.image_size: the loss counts images and Megatron "
            "weighs the balance loss by patches, which would not fit together; leave it out"
        )
    if model.fp8 is not None:
        yield f"fp8={model.fp8} with vision.image_size was never tried; leave it out"
    if train.engine != "megatron":
        yield f"train.engine={train.engine} with vision.image_size was never tried; use megatron"
    if config.parallel.context_parallel_size > 1:
        yield (
            f"context_parallel_size = {config.parallel.context_parallel_size} > 1 with "
            "vision.image_size: attention to all patches is not cut over ranks; use 1"
        )
