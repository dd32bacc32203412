"""Settings of the two codebooks that a code memory may have besides the vocabulary's codes."""

from __future__ import annotations

from dataclasses import replace

from vqmoe_megatron.config.code_memory import CodeMemoryConfig
from vqmoe_megatron.config.vq import VQConfig


def hidden_quantizer(vq: VQConfig, memory: CodeMemoryConfig) -> VQConfig:
    """The codebook of ``code_memory.codes=hidden``: the layer's settings of how codes move, and the
    memory's of how long. No expert stands behind a code, so there may be fewer codes than experts.
    """
    is_fixed = memory.freeze_after_steps == 0
    return replace(
        vq,
        path="dual",
        num_codes=memory.num_codes,
        quantizer="euclidean",
        code_dim=None,
        fsq_levels=None,
        learn_code_scale=False,
        train_projection=False,
        num_code_slices=1,
        code_map="mod",
        execution="tokens",
        table_per_step=False,
        overlap_table=False,
        freeze_codebook=is_fixed,
        freeze_after_steps=None if is_fixed else memory.freeze_after_steps,
        num_fill_experts=None,  # of path=filled
        fill_values=VQConfig.fill_values,
        threshold_routing=False,
    )


def context_quantizer(memory: CodeMemoryConfig) -> VQConfig:
    """The codebook of contexts: moving averages, dead codes revived early."""
    return VQConfig(
        num_codes=memory.num_context_codes, ema_decay=0.95, dead_code_threshold=0.2, norm="none"
    )
