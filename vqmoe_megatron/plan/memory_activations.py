"""What a code memory keeps of a microbatch on one rank, and what it makes within a pass.

T local tokens, A addresses per token, H hidden size, e bytes per element, c1 F the width of fc1.

    once per chunk    ids [T, A] of the plan and, where rows travel, the places of those asked for
    per layer         nothing of the rows: the gradient of a sum of rows needs their ids alone;
                      with a gate what it weighs [T, H], with values=experts what experts keep of
                      this rank's rows, with codes=hidden the layer's own ids
    within a pass     rows that were fetched, in fp32, twice: as they came and scaled forward, or
                      summed and sent home backward; of a table all rows, and this rank's of them
"""

from __future__ import annotations

from vqmoe_megatron.plan.memory_shape import MemoryShape

ID_BYTES, FP32_BYTES = 8, 4


def chunk_bytes(shape: MemoryShape) -> int:
    """Kept once for all layers of a chunk."""
    return 0 if shape.memory.codes == "hidden" else _plan_bytes(shape)


def _plan_bytes(shape: MemoryShape) -> int:
    num_ids = shape.num_reads
    if shape.num_ranks > 1 and not shape.is_table:
        num_ids += shape.num_ranks * shape.rows_per_owner
    return num_ids * ID_BYTES


def layer_bytes(shape: MemoryShape) -> int:
    """Kept by one layer that carries memory."""
    layer, memory, total = shape.layer, shape.memory, 0
    element = layer.bytes_per_element
    if memory.gate == "token":
        total += layer.num_local_tokens * (layer.hidden_size + 1) * element
    if memory.values == "experts":
        inner = layer.fc1_width + layer.moe_ffn_hidden_size
        inner += layer.moe_ffn_hidden_size if layer.gated_linear_unit else 0
        total += shape.rows_per_rank * inner * element
    if memory.codes == "hidden":
        total += _plan_bytes(shape) + layer.num_local_tokens * 3 * ID_BYTES
    return total


def transient_bytes(shape: MemoryShape) -> int:
    """Made within one layer's pass."""
    num_rows = shape.num_fetched
    num_rows += shape.rows_per_rank if shape.is_table else shape.num_fetched
    return num_rows * shape.layer.hidden_size * FP32_BYTES
