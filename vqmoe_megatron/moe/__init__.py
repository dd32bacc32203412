"""The distributed VQMoE layer and its parts.

``vqmoe_layer_spec`` is for Megatron-LM's ``--spec vqmoe_megatron.moe vqmoe_layer_spec``: its layers
read their settings from the file named by ``VQMOE_CONFIG``.
"""

from __future__ import annotations

from vqmoe_megatron.moe.codebook_sync import CodebookSync, synchronize_codebooks
from vqmoe_megatron.moe.grouped_experts import GroupedExperts
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.megatron_log import logged_names
from vqmoe_megatron.moe.memory.attach import attach_code_stream
from vqmoe_megatron.moe.memory.code_stream import CodeStream
from vqmoe_megatron.moe.memory.path import LayerMemory
from vqmoe_megatron.moe.routers.builder import LayerRouter
from vqmoe_megatron.moe.routers.codebook import VQRouter
from vqmoe_megatron.moe.spec import (
    get_vqmoe_block_spec,
    get_vqmoe_layer_spec,
    vqmoe_layer_spec,
)
from vqmoe_megatron.moe.token_stream import TokenStream, attach_token_stream
from vqmoe_megatron.runtime.versions import warn_of_versions

warn_of_versions()

__all__ = [
    "CodeStream",
    "CodebookSync",
    "METRIC_NAMES",
    "GroupedExperts",
    "LayerMemory",
    "LayerRouter",
    "TokenStream",
    "VQMoELayer",
    "VQRouter",
    "attach_code_stream",
    "attach_token_stream",
    "get_vqmoe_block_spec",
    "get_vqmoe_layer_spec",
    "synchronize_codebooks",
    "vqmoe_layer_spec",
]


def __getattr__(name: str) -> dict[str, str]:
    """``METRIC_NAMES``, read from the metric table when asked for: packages may add rows."""
    if name == "METRIC_NAMES":
        return logged_names()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
