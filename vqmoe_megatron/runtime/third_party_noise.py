"""Keep known, harmless messages of other libraries out of a run's log. Each with its reason."""

from __future__ import annotations

import logging
import warnings

KNOWN_WARNINGS = (
    # ``vqmoe doctor`` says which kernels are used and why.
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    # Megatron's own default, deprecated by itself.
    "full scope is deprecated",
    # Loading a checkpoint: Megatron's own calls into torch.
    "`load_state_dict` is deprecated and will be removed in future versions",
    "Please use DTensor instead and we are deprecating ShardedTensor",
    # Names that torch 2.13 replaced. Megatron calls the old ones; so do our layers, which run on
    # torch 2.11 too, where the new ones do not exist.
    "`torch.distributed.all_gather_into_tensor` is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
    # Megatron imports both from 0.17 on; a run uses neither.
    "absl.logging is not installed",
    "MimoModelConfig is experimental",
)
KNOWN_RECORDS = (
    # On the CPU the "GPU" generator is the CPU's, by design of cpu_compat.
    "CPU RNG state changed within GPU RNG context",
    # Megatron names its own MoE classes; a subclass gets the default groups, which is right.
    "Unknown MLP type",
    # From 0.17 on. Its successor needs a package of NVIDIA's (nvidia-resiliency-ext).
    "MCore's async save is deprecated",
    # common.pt, by which a checkpoint is the same at every supported Megatron.
    "load_common is deprecated",
    # Its successor does not exist in the oldest supported Megatron.
    "GPTModel IS DEPRECATED",
)
LOGGERS = (
    "megatron.core.tensor_parallel.random",
    "megatron.core.transformer.transformer_layer",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.models.gpt.gpt_model",
)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(KNOWN_RECORDS)


def quiet_known_messages() -> None:
    """Filter the messages above and nothing else. Call once, before Megatron is imported."""
    for text in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_is_news)
