"""Kernels of fill of one microbatch on one rank: the read of the table, and the exact pairs.

T local tokens, N experts, K codes, H hidden size, R rows of the padded products, B tokens of a
block. Counted from ``vq/fill.py``, which multiplies in fp32 (fp64), and ``moe/filled_path.py``. The
table itself is among the code rows of ``moe_kernels.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.plan.flops import Flops
from vqmoe_megatron.plan.hardware import FP32_FMA
from vqmoe_megatron.plan.kernels import BACKWARD, FORWARD, Kernel, moved
from vqmoe_megatron.plan.shape import LayerShape

SORT_BYTES = 128  # read, and written, by a sort of one id: 8 passes over key and place, int64
THRESHOLD_PASSES = 8  # over scores [T, N]: products, logarithms, bins, counts, choice


def fill_kernels(layer: LayerShape, flops: Flops) -> Iterator[Kernel]:
    """Of one layer; ``flops`` are those of its part ``fill``."""
    part, exact = "fill", layer.sum_bytes_per_element
    scores = layer.num_local_tokens * layer.num_moe_experts * exact
    if layer.vq.threshold_routing:
        read = THRESHOLD_PASSES * scores
        yield moved(part, "threshold", FORWARD, read, read, 3 * THRESHOLD_PASSES)
    if not layer.num_fill_block_rows:
        return
    rows, hidden = layer.num_fill_block_rows, layer.hidden_size
    tokens = layer.num_local_tokens * hidden
    block = max(layer.num_moe_experts, 1)
    tables = -(-rows // block) * layer.num_moe_experts * hidden * exact  # one of each block
    weights = rows * layer.num_moe_experts * exact
    sums = rows * hidden * exact
    sort = layer.num_local_tokens * SORT_BYTES
    yield moved(part, "fill weights", FORWARD, 3 * scores, 2 * scores, 6)
    yield moved(part, "tokens by code", FORWARD, sort + tables + weights, sort + tables, 14)
    yield Kernel(part, "products", FORWARD, FP32_FMA, flops.forward, tables + weights, sums)
    yield moved(part, "sum with exact outputs", FORWARD, 3 * tokens * exact, 2 * tokens * exact, 3)
    yield moved(
        part, "tokens by code", BACKWARD, sort + 2 * tables + sums, sort + tables + sums, 16
    )
    written = weights + (tables if layer.has_table_gradient else 0)
    yield Kernel(
        part, "products", BACKWARD, FP32_FMA, flops.backward, tables + 2 * sums + weights, written
    )
