"""Floating-point operations of one VQMoE layer on one rank, matrix products only.

T local tokens, H hidden size, F expert hidden size, N experts, K codes per slice, D columns of a
low_dim code, S code rows of the rank that owns most, E expert-tensor ranks, c1 F the width of fc1,
m = c1 + 1 matrices per expert. A multiply-add counts as 2.

    one row through an expert  forward              2 m H F
                               weight gradients     2 m H F
                               input gradients      2 m H F, of which fc2 takes 2 H F

A row whose input needs no gradient still needs that of fc2's input, to form fc1's weight gradient:
it saves only fc1's part. Experts are equally loaded; E shards see the rows of E ranks and do 1 / E
of each. The one row per code is the same for all ranks of the expert-tensor group.
low_dim multiplies by its fixed projection [D, H], which has no gradient of its own: tokens on their
way to the search and their gradients, 2 D H each way, and the rows of :func:`lift_flops` and
:func:`_num_lowered_rows`.
The experts are this package's grouped ones: Megatron's own repeat their forward pass to bring
gradients to tokens in code space.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.plan.layer_shape import LayerShape


@dataclass(frozen=True)
class FlopCost:
    """Operations of one microbatch by what they are for, and whether they are repeated."""

    dispatched_forward_flops: int  # experts, rows that travel
    dispatched_backward_flops: int
    code_rows_forward_flops: int  # experts, one row per code
    code_rows_backward_flops: int
    straight_through_flops: int  # code space: gradients back to the tokens; backward pass
    search_flops: int  # nearest code, with the projection of low_dim before it; forward pass
    lift_flops: int  # low_dim codes to expert inputs; forward pass, for the code rows in code space
    projection_backward_flops: int  # low_dim: gradients into the codes' space, and to the tokens
    router_forward_flops: int
    gate_forward_flops: int
    are_code_rows_once_per_step: bool = False

    @property
    def forward_flops(self) -> int:
        """Forward pass of a microbatch that evaluates the code rows."""
        return (
            self.dispatched_forward_flops
            + self.code_rows_forward_flops
            + self.search_flops
            + self.lift_flops
            + self.router_forward_flops
            + self.gate_forward_flops
        )

    @property
    def backward_flops(self) -> int:
        """Backward pass of a microbatch that evaluates the code rows. Router and gate take twice
        their forward pass; the search has no gradient."""
        return (
            self.dispatched_backward_flops
            + self.code_rows_backward_flops
            + self.straight_through_flops
            + self.projection_backward_flops
            + 2 * (self.router_forward_flops + self.gate_forward_flops)
        )

    @property
    def microbatch_flops(self) -> int:
        """Both passes of a microbatch that evaluates the code rows."""
        return self.forward_flops + self.backward_flops

    def step_flops(self, num_microbatches: int) -> int:
        """An optimizer step of so many microbatches."""
        code_rows = self.code_rows_forward_flops + self.code_rows_backward_flops + self.lift_flops
        repeated = self.microbatch_flops - code_rows
        times = 1 if self.are_code_rows_once_per_step else num_microbatches
        return num_microbatches * repeated + times * code_rows


def flop_cost(layer: LayerShape) -> FlopCost:
    """Return the operations of the layer on one rank with equally loaded experts."""
    tokens, hidden = layer.num_local_tokens, layer.hidden_size
    in_code_space = layer.execution == "code_space"
    rows = layer.num_dispatched_rows
    code_rows = layer.num_slots if in_code_space else 0
    shards = layer.expert_tensor_parallel_size
    return FlopCost(
        dispatched_forward_flops=rows * expert_forward_flops(layer),
        dispatched_backward_flops=rows
        * _backward_flops(layer, layer.dispatched_rows_need_gradient),
        code_rows_forward_flops=code_rows * expert_forward_flops(layer) // shards,
        code_rows_backward_flops=code_rows
        * _backward_flops(layer, layer.code_rows_need_gradient)
        // shards,
        straight_through_flops=_straight_through_flops(layer) if in_code_space else 0,
        search_flops=search_flops(layer),
        lift_flops=lift_flops(layer),
        projection_backward_flops=_projection_backward_flops(layer),
        router_forward_flops=(
            0 if layer.path == "discrete" else 2 * tokens * hidden * layer.num_moe_experts
        ),
        gate_forward_flops=2 * tokens * hidden * num_gate_outputs(layer),
        are_code_rows_once_per_step=layer.table_per_step,
    )


def expert_forward_flops(layer: LayerShape) -> int:
    """2 m H F: one row through one whole expert."""
    return 2 * layer.hidden_size * (layer.fc1_width + layer.moe_ffn_hidden_size)


def search_flops(layer: LayerShape) -> int:
    """2 T H K: every slice of every token against that slice's K codes. low_dim: 2 T D K, and
    2 T D H for the tokens' projection."""
    if layer.path == "continuous":
        return 0
    searched = 2 * layer.num_discrete_rows * layer.code_width * layer.num_codes
    return searched + layer.num_local_tokens * _projection_flops(layer)


def lift_flops(layer: LayerShape) -> int:
    """low_dim: 2 D H for every code that is brought to H columns, per code in code space, where
    all E shards do the same, else per token. A learned input has H already."""
    if layer.code_input == "learned":
        return 0
    in_code_space = layer.execution == "code_space"
    num_rows = layer.num_slots if in_code_space else layer.num_discrete_rows
    return num_rows * _projection_flops(layer)


def _projection_flops(layer: LayerShape) -> int:
    """2 D H: one row through the projection of low_dim, either way."""
    return 0 if layer.code_dim is None else 2 * layer.code_dim * layer.hidden_size


def _projection_backward_flops(layer: LayerShape) -> int:
    """Gradients of expert inputs or outputs into the codes' space, and from there, together with
    the commitment loss's, to every token."""
    if layer.path == "continuous":
        return 0
    num_rows = layer.num_local_tokens + _num_lowered_rows(layer)
    return num_rows * _projection_flops(layer)


def _num_lowered_rows(layer: LayerShape) -> int:
    """Gradient rows that are brought into the space of low_dim: those of tokens, or where code
    space does it at the owner of a code, before they travel back, the rows on each of E shards."""
    if not layer.has_code_inputs or layer.straight_through == "none":
        return 0
    is_at_owner = layer.execution == "code_space" and layer.code_input == "codebook"
    if is_at_owner and layer.straight_through in ("token", "group"):
        return layer.expert_tensor_parallel_size * num_gradient_rows_to_tokens(layer)
    return layer.num_local_tokens


def num_gate_outputs(layer: LayerShape) -> int:
    """Logits of the combine gate, which only the dual path has: 2 for softmax, 1 for sigmoid."""
    if layer.path != "dual":
        return 0
    return 2 if layer.combine == "softmax" else 1


def _backward_flops(layer: LayerShape, needs_input_gradient: bool) -> int:
    """One row back through one whole expert."""
    fc1_input_gradient = 2 * layer.hidden_size * layer.fc1_width
    both = 2 * expert_forward_flops(layer)
    return both if needs_input_gradient else both - fc1_input_gradient


def num_gradient_rows_to_tokens(layer: LayerShape) -> int:
    """Rows whose input gradients a rank forms in code space for straight_through: the T C of its
    equal share (token), or one per slot from every rank (group)."""
    return {
        "token": layer.num_discrete_rows,
        "group": layer.expert_model_parallel_size * layer.num_slots,
    }.get(layer.straight_through, 0)


def _straight_through_flops(layer: LayerShape) -> int:
    """Input gradients at the activations of the S code rows, whose fc1 runs once more."""
    num_rows = num_gradient_rows_to_tokens(layer)
    if not num_rows:
        return 0
    again = 2 * layer.hidden_size * layer.fc1_width * layer.num_slots
    return num_rows * expert_forward_flops(layer) + again // layer.expert_tensor_parallel_size
