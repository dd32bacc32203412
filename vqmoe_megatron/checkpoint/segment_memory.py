"""Transformer-XL's memory in a checkpoint: by layer and row of the global batch, at any layout.

B rows of a global batch, M tokens of memory, H hidden size, b rows of a microbatch, D data-parallel
ranks. Row r is always stream r, so a layer's memory is one global tensor ``[B, M, H]``; microbatch
m of rank d holds rows ``(m D + d) b + [0, b)``. Tensor-parallel ranks are replicas. While text
before is shorter than M, the end is zeros, and the length is stored beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from vqmoe_megatron.moe.transformer_xl.segment_memory import SegmentMemory

LENGTH = "segment_memory_length_tokens"
ROWS = "segment_memory"


def sharded_segment_memory(model: list[torch.nn.Module]) -> dict[str, Any]:
    """The memories of this rank's chunks, and their length; nothing for a model without.

    No communication.
    """
    memories = _memories(model)
    if not memories:
        return {}
    rows = {
        f"{layer}.{number}": _sharded(model[0], memory, layer, number)
        for memory in memories
        for layer in memory.layers
        for number in range(memory.num_microbatches)
    }
    return {ROWS: rows, LENGTH: memories[0].num_remembered_tokens}


def restore_segment_memory(model: list[torch.nn.Module], loaded: dict[str, Any]) -> None:
    """Undo :func:`sharded_segment_memory`, of a loaded checkpoint."""
    for memory in _memories(model):
        for number, kept in enumerate(memory.trained):
            kept.clear()
            for layer in memory.layers if loaded[LENGTH] else []:
                rows = loaded[ROWS][f"{layer}.{number}"][:, : loaded[LENGTH]]
                kept[layer] = rows.transpose(0, 1).contiguous()


def _memories(model: list[torch.nn.Module]) -> list[SegmentMemory]:
    return [part for chunk in model for part in chunk.modules() if isinstance(part, SegmentMemory)]


def _sharded(
    chunk: torch.nn.Module, memory: SegmentMemory, layer: int, number: int
) -> ShardedTensor:
    size = parallel_state.get_data_parallel_world_size()
    place = number * size + parallel_state.get_data_parallel_rank()
    return ShardedTensor.from_rank_offsets(
        f"segment_memory.layers.{layer}",
        _padded_rows(memory, layer, number),
        (0, place, memory.num_microbatches * size),
        replica_id=(0, parallel_state.get_tensor_model_parallel_rank(), 0),
    )


def _padded_rows(memory: SegmentMemory, layer: int, number: int) -> torch.Tensor:
    """``[b, M, H]``."""
    rows = memory.rows(layer, number)
    missing = memory.length_tokens - rows.shape[1]
    return torch.nn.functional.pad(rows, (0, 0, 0, missing)).contiguous()
