"""Kernels of one microbatch of one MoE layer on one rank: rows, experts, router and gate.

T local tokens, H hidden size, F expert width, c1 F the width of fc1, N experts, n local ones, P
expert-parallel and E expert-tensor ranks, R rows of this rank that travel, S code rows, b bytes per
element. Operations are those of ``flops.layer_flops``; the discrete path's own kernels are in
``discrete_kernels.py`` and ``search_kernels.py``.

Travelling rows are gathered in four places (sorted by expert, regrouped by local expert, and back)
or, where nothing is exchanged, in two; gradients likewise. Rows of the one expert that a rank holds
whole stay as they are. Code rows of the dual path are evaluated
by the same grouped GEMM as travelling rows, which reads the weights once for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vqmoe_megatron.config import ModelConfig
from vqmoe_megatron.plan.discrete_kernels import discrete_kernels
from vqmoe_megatron.plan.flops import Flops, layer_flops, num_lifted_rows
from vqmoe_megatron.plan.hardware import FP32_FMA, Hardware
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
from vqmoe_megatron.plan.search_kernels import search_kernels
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.transformer_kernels import activation_kernels, mlp_kernels

SORT_BYTES = 128  # read, and written, by a sort of one id: 8 passes over key and place, int64


def moe_kernels(model: ModelConfig, layer: LayerShape, hardware: Hardware) -> Iterator[Kernel]:
    """All of them; with one table per step code rows are of the phase ``step``."""
    flops = layer_flops(layer)
    yield from _router(model, layer, flops["router"], hardware)
    yield from _gate(layer, flops["gate"])
    yield from _dispatch(layer)
    yield from _experts(layer, flops["dispatched"])
    yield from _shared_expert(layer, flops["shared_expert"])
    for kernel in _code_rows(layer, flops):
        yield replace(kernel, phase=STEP) if layer.vq.table_per_step else kernel
    yield from search_kernels(layer, hardware.device)
    yield from discrete_kernels(layer, flops, hardware.device)


def num_expert_elements(layer: LayerShape) -> int:
    """Weights of this rank's shard of its n experts."""
    width = (layer.fc1_width + layer.moe_ffn_hidden_size) // layer.expert_tensor_parallel_size
    return layer.num_experts_per_rank * layer.hidden_size * width


def _experts(layer: LayerShape, flops: Flops) -> Iterator[Kernel]:
    if not layer.num_dispatched_rows:
        return
    rows = layer.expert_tensor_parallel_size * layer.num_dispatched_rows
    tensors = _expert_bytes(layer, rows, num_expert_elements(layer))
    unit = model_unit(layer.bytes_per_element)
    yield from products("expert GEMMs", "grouped products", unit, flops, tensors, launches=2)
    yield from _activation("activation of travelling rows", layer, rows)


def _shared_expert(layer: LayerShape, flops: Flops) -> Iterator[Kernel]:
    """The tokens of TP ranks through this rank's columns, and its sum with the rest."""
    if not flops.forward:
        return
    shards, halves = layer.tensor_model_parallel_size, 2 if layer.gated_linear_unit else 1
    tokens, width = shards * layer.num_local_tokens, layer.shared_expert_width // shards
    element, hidden = layer.bytes_per_element, layer.hidden_size
    yield from mlp_kernels("shared expert", tokens, hidden, width, halves, element, flops.forward)
    output = layer.num_local_tokens * hidden * element
    yield moved("shared expert", "sum", FORWARD, 2 * output, output)


def _code_rows(layer: LayerShape, flops: dict[str, Flops]) -> Iterator[Kernel]:
    if not layer.num_slots:
        yield from _lift(layer, flops["lift"])
        return
    if layer.vq.fill_values == "direct":
        yield from _table(layer)
        return
    part, element, hidden = "code rows", layer.bytes_per_element, layer.hidden_size
    is_alone = not layer.num_travelling_rows or layer.vq.builds_table_alone
    weights = num_expert_elements(layer) if is_alone else 0
    yield from products(
        part,
        "grouped products",
        model_unit(element),
        flops["code_rows"],
        _expert_bytes(layer, layer.num_evaluated_slots, weights),
        launches=2 if is_alone else 0,
    )
    yield from _activation("activation of code rows", layer, layer.num_slots)
    yield from _lift(layer, flops["lift"])
    rows = layer.num_slots * hidden
    yield moved(part, "inputs", FORWARD, rows * FP32_BYTES, rows * element, 4)
    if layer.num_norms:
        yield moved(part, "input norm", FORWARD, rows * element, rows * element, 2)
        yield moved(part, "input norm", BACKWARD, 2 * rows * element, rows * element, 3)
    yield from _table(layer)
    table = layer.expert_model_parallel_size * rows * layer.sum_bytes_per_element
    if layer.num_norms and layer.vq.num_code_slices == 1:
        yield moved(part, "output norm", FORWARD, table, table, 2)
        yield moved(part, "output norm", BACKWARD, 2 * table, table, 3)


def _table(layer: LayerShape) -> Iterator[Kernel]:
    """All ranks' rows side by side in fp32, and their gradients' sums."""
    rows = layer.expert_model_parallel_size * layer.num_slots * layer.hidden_size
    table = rows * layer.sum_bytes_per_element
    yield moved("code rows", "table", FORWARD, table, table, 3)
    if layer.has_table_gradient:
        yield moved("code rows", "table", BACKWARD, 2 * table, table, 4)


def _lift(layer: LayerShape, flops: Flops) -> Iterator[Kernel]:
    """low_dim: codes to hidden vectors, in fp32."""
    if not flops.forward:
        return
    num_rows = num_lifted_rows(layer)
    width = layer.code_width
    read = (num_rows * width + width * layer.hidden_size) * FP32_BYTES
    written = num_rows * layer.hidden_size * FP32_BYTES
    yield Kernel("code rows", "lift", FORWARD, FP32_FMA, flops.forward, read, written)


def _expert_bytes(layer: LayerShape, rows: int, weights: int) -> ProductBytes:
    element, shards = layer.bytes_per_element, layer.expert_tensor_parallel_size
    return ProductBytes(
        inputs=rows * (layer.hidden_size + layer.moe_ffn_hidden_size // shards) * element,
        outputs=rows * (layer.fc1_width // shards + layer.hidden_size) * element,
        weights=weights,
        element=element,
    )


def _activation(name: str, layer: LayerShape, rows: int) -> Iterator[Kernel]:
    outputs = rows * layer.moe_ffn_hidden_size // layer.expert_tensor_parallel_size
    halves = 2 if layer.gated_linear_unit else 1
    yield from activation_kernels(name, outputs, halves, layer.bytes_per_element)


def _router(
    model: ModelConfig, layer: LayerShape, flops: Flops, hardware: Hardware
) -> Iterator[Kernel]:
    """Scores of N experts, softmax, selection, balance loss. With ``moe_router_dtype`` Megatron
    multiplies in it, but for the forward product of Transformer Engine; fp64 is counted as fp32."""
    if not flops.forward:
        return
    part, element, tokens = "router and gate", layer.bytes_per_element, layer.num_local_tokens
    own = model_unit(element)
    exact = own if model.moe_router_dtype is None else FP32_FMA
    unit = own if hardware.kernels == "fused" else exact
    logits = tokens * layer.num_moe_experts * FP32_BYTES
    hidden, weights = tokens * layer.hidden_size, layer.hidden_size * layer.num_moe_experts
    tensors = ProductBytes(hidden * element, logits, weights, element)
    for kernel in products(part, "router", unit, flops, tensors):
        is_exact = kernel.phase == BACKWARD and kernel.operations
        yield replace(kernel, unit=exact) if is_exact else kernel
    if exact != own:  # tokens and gradients between the two dtypes
        casts = hidden * (element + FP32_BYTES)
        yield moved(part, "router casts", BACKWARD, casts, casts, 4)
    yield moved(part, "router scores", FORWARD, 4 * logits, 2 * logits, 20)
    yield moved(part, "router scores", BACKWARD, 4 * logits, 2 * logits, 20)


def _gate(layer: LayerShape, flops: Flops) -> Iterator[Kernel]:
    if not flops.forward:
        return
    element, tokens = layer.bytes_per_element, layer.num_local_tokens
    weights = layer.hidden_size * layer.num_gate_outputs
    tensors = ProductBytes(
        tokens * layer.hidden_size * element,
        tokens * layer.num_gate_outputs * element,
        weights,
        element,
    )
    yield from products("router and gate", "gate", model_unit(element), flops, tensors)
    logits = tokens * layer.num_gate_outputs * FP32_BYTES
    yield moved("router and gate", "gate weights", FORWARD, 2 * logits, 2 * logits, 3)
    yield moved("router and gate", "gate weights", BACKWARD, 3 * logits, 2 * logits, 4)


def _dispatch(layer: LayerShape) -> Iterator[Kernel]:
    """Rows sorted by expert and brought back, and the continuous path's weighted sum."""
    if not layer.num_travelling_rows:
        return
    part, element, shards = "dispatch", layer.bytes_per_element, layer.expert_tensor_parallel_size
    sent = layer.num_travelling_rows * layer.hidden_size * element
    is_exchanged = layer.expert_model_parallel_size * shards > 1
    gathered = 2 * sent + (2 * shards * sent if is_exchanged else 0)
    sorts = (1 + shards if is_exchanged else 1) * layer.num_travelling_rows * SORT_BYTES
    # code rows join, by a copy of all
    if layer.num_evaluated_slots and not layer.vq.builds_table_alone:
        gathered += shards * sent
    launches = 45 if is_exchanged else 20
    yield moved(part, "rows", FORWARD, gathered + sorts, gathered + sorts, launches)
    yield moved(part, "rows", BACKWARD, gathered, gathered, 6 if is_exchanged else 3)
    if layer.has_router:
        rows = layer.num_continuous_rows * layer.hidden_size
        output = layer.num_local_tokens * layer.hidden_size
        sums = rows * FP32_BYTES if layer.moe_router_topk > 1 else 0
        yield moved(
            part, "weighted sum", FORWARD,
            rows * element + sums + output * FP32_BYTES,
            rows * FP32_BYTES + (output * FP32_BYTES if sums else 0) + output * element, 3,
        )  # fmt: skip
        yield moved(
            part, "weighted sum", BACKWARD,
            output * element + rows * (element + 4 * FP32_BYTES),
            output * FP32_BYTES + rows * (element + 2 * FP32_BYTES), 5,
        )  # fmt: skip
