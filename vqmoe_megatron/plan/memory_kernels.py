"""Kernels of a code memory on one rank: reading rows, their gradients, the plan, the codes.

T local tokens, A addresses per token, H hidden size, V vocabulary (padded), K codes, U rows that
lie on the rank while it reads. Counted from ``moe/memory`` and ``vq/vocabulary_codes.py``. Rows
count once per token that reads them, although many lie in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.plan.discrete_kernels import ID_BYTES, SORTED_ID_BYTES, SORTED_SUM_LAUNCHES
from vqmoe_megatron.plan.flops import Flops, context_flops, made_row_flops, vocabulary_flops
from vqmoe_megatron.plan.hardware import FP32_FMA
from vqmoe_megatron.plan.kernels import (
    BACKWARD,
    FORWARD,
    FP32_BYTES,
    STEP,
    Kernel,
    ProductBytes,
    model_unit,
    moved,
    products,
)
from vqmoe_megatron.plan.memory_shape import MemoryShape
from vqmoe_megatron.plan.moe_kernels import num_expert_elements
from vqmoe_megatron.plan.parameters import ChunkPlace
from vqmoe_megatron.plan.search_kernels import search_kernels

PART = "code memory"
HASH_PASSES = 16  # over int64 [T, A]: shifts, hashes, slots; read and written
HASH_LAUNCHES = 20  # per address
PLAN_LAUNCHES = 30
VOCABULARY_PASSES = (8, 5)  # over [V / TP, H] besides the search: weighed, summed, differences
VOCABULARY_LAUNCHES = 60
COUNT_LAUNCHES = 4  # of a microbatch's reads
USAGE_PASSES = (6, 3)  # over [R] in fp32, once per step: summed, the most read ones found, copied
USAGE_LAUNCHES = 20


def memory_kernels(shape: MemoryShape, device: str) -> Iterator[Kernel]:
    """Of one layer and microbatch on ``device`` (cpu | cuda)."""
    layer = shape.layer
    hidden, element = layer.hidden_size, layer.bytes_per_element
    output = layer.num_local_tokens * hidden * element
    fetched = shape.num_fetched * hidden * FP32_BYTES
    own = shape.rows_per_rank * hidden * element
    read = shape.num_reads * hidden * FP32_BYTES + shape.num_reads * ID_BYTES
    yield moved(PART, "rows in fp32", FORWARD, own + fetched, 2 * fetched, 3)
    yield moved(PART, "sums of rows", FORWARD, read + 2 * output, 2 * output, 3)
    sorts = shape.num_reads * SORTED_ID_BYTES
    addresses = shape.memory.num_addresses
    yield moved(
        PART, "gradients of rows", BACKWARD, addresses * (output + 2 * fetched) + sorts,
        addresses * 2 * fetched + sorts, addresses * (SORTED_SUM_LAUNCHES + 1) + 2,
    )  # fmt: skip
    yield moved(PART, "gradients home", BACKWARD, fetched + own, 2 * own, SORTED_SUM_LAUNCHES + 2)
    yield from _gate(shape)
    if shape.memory.values == "experts":
        yield from _experts(shape)
    if shape.memory.codes == "hidden":
        yield from search_kernels(shape.hidden_layer, device)
        yield from _plan(shape)
        yield from _usage(shape, BACKWARD)


def _gate(shape: MemoryShape) -> Iterator[Kernel]:
    layer = shape.layer
    if shape.memory.gate != "token":
        return
    element, tokens = layer.bytes_per_element, layer.num_local_tokens
    operations = 2 * tokens * layer.hidden_size
    x = tokens * layer.hidden_size * element
    sizes = ProductBytes(x, tokens * element, layer.hidden_size + 1, element)
    of_gate = Flops(operations, 2 * operations)
    yield from products(PART, "gate", model_unit(element), of_gate, sizes)
    yield moved(PART, "gated rows", FORWARD, x, x, 2)
    yield moved(PART, "gated rows", BACKWARD, 3 * x, 2 * x, 4)


def _experts(shape: MemoryShape) -> Iterator[Kernel]:
    layer, element = shape.layer, shape.layer.bytes_per_element
    rows = shape.rows_per_rank * layer.hidden_size * element
    sizes = ProductBytes(rows, rows, num_expert_elements(layer), element)
    unit = model_unit(element)
    yield from products(PART, "rows that experts make", unit, made_row_flops(shape), sizes, 2)


def stream_kernels(shape: MemoryShape, vocab_size: int, place: ChunkPlace) -> Iterator[Kernel]:
    """Of one chunk: per microbatch the plan, and the codes of the next step once per step."""
    memory = shape.memory
    if memory.codes == "hidden":
        return
    yield from _plan(shape)
    if place.is_first:
        yield from _usage(shape, FORWARD)
    if memory.num_context_codes:
        vectors = shape.num_tokens * memory.context_dim * FP32_BYTES
        codes = memory.num_context_codes * memory.context_dim * FP32_BYTES
        yield moved(PART, "means of contexts", FORWARD, 20 * vectors, 12 * vectors, 40)
        yield Kernel(
            PART, "search of contexts", FORWARD, FP32_FMA,
            context_flops(shape), vectors + codes, shape.num_tokens * ID_BYTES, 6,
        )  # fmt: skip
    if not (place.is_first and shape.moves):
        return
    entries = vocab_size // shape.layer.tensor_model_parallel_size
    table = entries * shape.layer.hidden_size * FP32_BYTES
    codes = memory.num_codes * shape.layer.hidden_size * FP32_BYTES
    yield Kernel(
        PART, "search of the vocabulary", STEP, FP32_FMA,
        vocabulary_flops(shape, vocab_size), table + codes, entries * ID_BYTES, 8,
    )  # fmt: skip
    reads, writes = VOCABULARY_PASSES
    yield moved(
        PART, "means of the vocabulary", STEP, reads * table, writes * table, VOCABULARY_LAUNCHES
    )


def _usage(shape: MemoryShape, phase: str) -> Iterator[Kernel]:
    """Reads by row (``moe/memory/row_usage.py``): of a microbatch, and at the end of the step."""
    counted = shape.num_reads * FP32_BYTES
    yield moved(
        PART, "reads by row", phase,
        shape.num_reads * ID_BYTES + 2 * counted, counted, COUNT_LAUNCHES,
    )  # fmt: skip
    reads, writes = USAGE_PASSES
    table = shape.memory.rows_per_layer * FP32_BYTES
    yield moved(PART, "rows in use", STEP, reads * table, writes * table, USAGE_LAUNCHES)


def _plan(shape: MemoryShape) -> Iterator[Kernel]:
    """Addresses of all tokens, and, in the form of rows, a sort of this rank's reads."""
    ids = shape.num_tokens * shape.memory.num_addresses * ID_BYTES
    launches = HASH_LAUNCHES * shape.memory.num_addresses
    yield moved(PART, "addresses", FORWARD, HASH_PASSES * ids, HASH_PASSES * ids, launches)
    if shape.num_ranks > 1 and not shape.is_table:
        sorts = shape.num_reads * SORTED_ID_BYTES
        yield moved(PART, "distinct rows", FORWARD, sorts, sorts, PLAN_LAUNCHES)
