"""The distributed VQMoE layer and its parts.

``vqmoe_layer_spec`` is built at first use, from the file named by ``VQMOE_CONFIG``, for
Megatron-LM's ``--spec vqmoe_megatron.moe vqmoe_layer_spec``.
"""

from __future__ import annotations

from typing import Any

from vqmoe_megatron.moe.codebook_sync import CodebookSync, synchronize_codebooks
from vqmoe_megatron.moe.grouped_experts import GroupedExperts
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.router import VQRouter
from vqmoe_megatron.moe.spec import (
    get_vqmoe_block_spec,
    get_vqmoe_layer_spec,
    layer_spec_from_environment,
)

__all__ = [
    "CodebookSync",
    "GroupedExperts",
    "VQMoELayer",
    "VQRouter",
    "get_vqmoe_block_spec",
    "get_vqmoe_layer_spec",
    "synchronize_codebooks",
    "vqmoe_layer_spec",
]


def __getattr__(name: str) -> Any:
    if name == "vqmoe_layer_spec":
        return layer_spec_from_environment()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
