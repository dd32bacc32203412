"""Saved activations of one VQMoE layer on one rank, and its parameters.

T local tokens, H hidden size, F expert hidden size, c1 F the width of fc1, b bytes per element, C
codes per token, K codes per slice, D columns of a code, N experts, S slots per rank in code space,
P expert-parallel and E expert-tensor ranks.

An expert saves of every row its input [H], fc1's output [c1 F] and fc2's input [F]; a shard has the
rows of E ranks and 1 / E of the width. Counted is what the two executions do not share: rows in
experts, the table of code outputs and the codes that read it. Experts are equally loaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.plan.flop_cost import num_gate_outputs, num_gradient_rows_to_tokens
from vqmoe_megatron.plan.layer_shape import LayerShape

CODE_ID_BYTES = 8  # codes are int64


@dataclass(frozen=True)
class SavedBytes:
    """What one microbatch keeps from its forward pass for its backward pass."""

    dispatched_rows_bytes: int  # in the experts
    code_rows_bytes: int  # in the experts, code space
    table_bytes: int  # [P S, H] code outputs in fp32 (fp64), code space
    code_ids_bytes: int  # [T, C], code space
    transient_bytes: int  # [R, c1 F] within the backward pass, code space; see below

    @property
    def saved_bytes(self) -> int:
        """Kept between the passes."""
        return (
            self.dispatched_rows_bytes
            + self.code_rows_bytes
            + self.table_bytes
            + self.code_ids_bytes
        )

    @property
    def peak_bytes(self) -> int:
        """Kept between the passes, and made anew within the backward pass."""
        return self.saved_bytes + self.transient_bytes


@dataclass(frozen=True)
class LayerParameters:
    """Elements of one layer's parameters over all ranks, replicas counted once. The EMA codebook
    counts: it is stored as a parameter, though no optimizer moves it. The fixed projection of
    low_dim does not: it is a buffer."""

    experts: int
    router: int
    gate: int
    codebook: int  # C K D
    learned_inputs: int  # code_input=learned: a vector of full width per code
    norms: int
    active_experts: int  # those of the rows of one token
    active_learned_inputs: int

    @property
    def total(self) -> int:
        """All elements."""
        return (
            self.experts
            + self.router
            + self.gate
            + self.codebook
            + self.learned_inputs
            + self.norms
        )

    @property
    def active_per_token(self) -> int:
        """Elements that take part in one token: its rows' experts (as many as rows, also when two
        meet one expert), its codes' learned inputs, and the whole of router, gate, codebook (every
        code is compared) and norms."""
        idle = self.experts - self.active_experts
        return self.total - idle - (self.learned_inputs - self.active_learned_inputs)


def saved_bytes(layer: LayerShape) -> SavedBytes:
    """Return the saved activations of the layer on one rank.

    Transient are the R rows of ``straight_through``, at fc1's output: of tokens or of codes.
    """
    b, shards = layer.bytes_per_element, layer.expert_tensor_parallel_size
    inner = (layer.fc1_width + layer.moe_ffn_hidden_size) // shards
    row_bytes = b * (layer.hidden_size + inner)
    in_code_space = layer.execution == "code_space"
    num_slots = layer.num_slots if in_code_space else 0
    num_table_rows = layer.expert_model_parallel_size * num_slots
    num_gradient_rows = num_gradient_rows_to_tokens(layer) if in_code_space else 0
    return SavedBytes(
        dispatched_rows_bytes=shards * layer.num_dispatched_rows * row_bytes,
        code_rows_bytes=num_slots * row_bytes,
        table_bytes=num_table_rows * layer.hidden_size * layer.sum_bytes_per_element,
        code_ids_bytes=CODE_ID_BYTES * layer.num_discrete_rows if in_code_space else 0,
        transient_bytes=num_gradient_rows * layer.fc1_width * b,
    )


def layer_parameters(layer: LayerShape) -> LayerParameters:
    """Return the elements of the layer's parameters."""
    hidden, has_bias = layer.hidden_size, int(layer.add_bias_linear)
    has_codes, has_router = int(layer.path != "continuous"), int(layer.path != "discrete")
    expert = layer.fc1_width * (hidden + has_bias) + hidden * (layer.moe_ffn_hidden_size + has_bias)
    rows_per_token = has_router * layer.moe_router_topk + has_codes * layer.num_code_slices
    num_norms = has_codes * {"none": 0, "shared": 1, "separate": 2}[layer.norm]
    is_learned = has_codes * int(layer.code_input == "learned")
    return LayerParameters(
        experts=layer.num_moe_experts * expert,
        router=has_router * layer.num_moe_experts * (hidden + has_bias),
        gate=num_gate_outputs(layer) * (hidden + 1),
        codebook=has_codes * layer.num_code_rows * layer.code_width,
        learned_inputs=is_learned * layer.num_code_rows * hidden,
        norms=num_norms * hidden * (2 if layer.normalization == "LayerNorm" else 1),
        active_experts=min(rows_per_token, layer.num_moe_experts) * expert,
        active_learned_inputs=is_learned * layer.num_code_slices * hidden,
    )
