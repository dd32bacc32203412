"""Bytes of the buffers by which a code memory knows its codes, on one rank.

V vocabulary (padded), K codes, d width of contexts, H hidden size. A stream on every model chunk:
codes of the vocabulary int64 [V], a step's tokens fp32 [V], the count of steps; with contexts
their vectors [V, d] and codes; the first chunk of the first stage besides the codes [K, H], how
often each entry is seen [V], the contexts' codebook and its projection [H, d].

Reads by row, of the step and since the process began, with two sums of distinct rows: on the first
chunk of the first stage, with codes of hidden states in every layer that carries memory.
"""

from __future__ import annotations

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.codebook_bytes import assigner_bytes, codebook_bytes
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory_shape import MemoryShape, num_memory_layers
from vqmoe_megatron.plan.parameters import ChunkPlace, padded_vocab_size

ID_BYTES, FP32_BYTES = 8, 4


def memory_buffer_bytes(config: RunConfig, layout: ParallelLayout, places: list[ChunkPlace]) -> int:
    """Of the chunks of one rank, after the second step; without the codes of contexts, which count
    as a weight. 0 without a code memory.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    memory = config.code_memory
    if not memory.is_on:
        return 0
    shape = MemoryShape.from_config(config, layout)
    total = sum(_stream_bytes(config, shape, place) for place in places)
    if memory.codes == "hidden":
        of_layer = assigner_bytes(shape.hidden_layer) + _usage_bytes(shape)
        total += num_memory_layers(config, places) * of_layer
    return total


def _usage_bytes(shape: MemoryShape) -> int:
    return (shape.num_usage_sums + shape.memory.rows_per_layer) * FP32_BYTES


def _stream_bytes(config: RunConfig, shape: MemoryShape, place: ChunkPlace) -> int:
    memory, vocab = shape.memory, padded_vocab_size(config.model)
    num_contexts, width = memory.num_context_codes, memory.context_dim
    total = vocab * (ID_BYTES + FP32_BYTES) + ID_BYTES
    if num_contexts:
        total += (vocab + num_contexts) * width * FP32_BYTES
    if place.is_first and memory.codes != "hidden":
        total += _usage_bytes(shape)
    if not (memory.moves(vocab) and place.is_first):
        return total
    hidden = config.model.hidden_size
    total += (min(memory.num_codes, vocab) * hidden + vocab) * FP32_BYTES
    if num_contexts:
        total += codebook_bytes(shape.context_layer, shape.num_context_candidates)
        total += hidden * width * FP32_BYTES
    return total
