"""Operations against matrix products walked one by one, and against torch's own counter."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vqmoe_megatron.plan.flop_cost import flop_cost
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.ownership import owner_rank

LAYER = LayerShape(num_local_tokens=12, hidden_size=6, moe_ffn_hidden_size=20, num_moe_experts=4)


def matrices(layer: LayerShape, shards: int) -> list[tuple[int, int]]:
    """(in, out) of an expert's matrices on one shard; gated experts have gate, up and down."""
    cut = layer.moe_ffn_hidden_size // shards
    ups = [(layer.hidden_size, cut)] * (2 if layer.gated_linear_unit else 1)
    return [*ups, (cut, layer.hidden_size)]


def walk(layer: LayerShape, shards: int, num_rows: int, needs_input: bool) -> tuple[int, int]:
    """(forward, backward) of so many rows on one shard, product by product."""
    forward = backward = 0
    for _ in range(num_rows):
        for rows_in, rows_out in matrices(layer, shards):
            forward += 2 * rows_in * rows_out
            backward += 2 * rows_in * rows_out  # its weight
            if needs_input or rows_out == layer.hidden_size:  # the last one's input is computed
                backward += 2 * rows_in * rows_out
    return forward, backward


def fullest_rank_rows(layer: LayerShape, num_rows: int) -> int:
    """Rows of rank 0 of P when row r belongs to expert r mod N."""
    ranks = layer.expert_model_parallel_size
    experts = [row % layer.num_moe_experts for row in range(num_rows)]
    return sum(owner_rank(e, layer.num_moe_experts, ranks) == 0 for e in experts)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("ranks", "shards"), list(product((1, 2, 4), (1, 2))))
def test_token_rows(gated: bool, ranks: int, shards: int) -> None:
    layer = replace(
        LAYER, gated_linear_unit=gated, moe_router_topk=3, expert_model_parallel_size=ranks,
        expert_tensor_parallel_size=shards,
    )  # fmt: skip
    # every one of P * E ranks has 12 tokens with 3 + 1 rows; all shards see those of E ranks
    arrived = shards * fullest_rank_rows(layer, ranks * 12 * 4)
    cost = flop_cost(layer)
    assert (cost.dispatched_forward_flops, cost.dispatched_backward_flops) == walk(
        layer, shards, arrived, needs_input=True
    )
    assert cost.code_rows_forward_flops == cost.straight_through_flops == 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("ranks", "shards"), list(product((1, 2, 4), (1, 2))))
@pytest.mark.parametrize(("norm", "needs_input"), [("none", False), ("separate", True)])
def test_code_rows(gated: bool, ranks: int, shards: int, norm: str, needs_input: bool) -> None:
    layer = replace(
        LAYER, gated_linear_unit=gated, execution="code_space", path="discrete", norm=norm,
        straight_through="none", num_codes=7, num_code_slices=3,
        expert_model_parallel_size=ranks, expert_tensor_parallel_size=shards,
    )  # fmt: skip
    cost = flop_cost(layer)
    rows = fullest_rank_rows(layer, 21)
    assert (cost.code_rows_forward_flops, cost.code_rows_backward_flops) == walk(
        layer, shards, rows, needs_input
    )
    assert cost.dispatched_forward_flops == cost.straight_through_flops == 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_gradients_to_tokens(gated: bool, shards: int) -> None:
    layer = replace(
        LAYER, gated_linear_unit=gated, execution="code_space", path="discrete", num_codes=10,
        num_code_slices=2, expert_model_parallel_size=2, expert_tensor_parallel_size=shards,
    )  # fmt: skip
    fc1_again = sum(
        2 * rows_in * rows_out
        for _ in range(10)  # 20 code rows on 2 ranks
        for rows_in, rows_out in matrices(layer, shards)[:-1]
    )
    # both ranks have 12 tokens with 2 codes, all shards see them; input gradient = forward's cost
    per_token, _ = walk(layer, shards, shards * 12 * 2, True)
    assert flop_cost(layer).straight_through_flops == per_token + fc1_again
    # or the sums of 2 ranks per code row
    per_code, _ = walk(layer, shards, shards * 2 * 10, True)
    group = flop_cost(replace(layer, straight_through="group"))
    assert group.straight_through_flops == per_code + fc1_again
    for cheap in ("identity", "none"):
        assert flop_cost(replace(layer, straight_through=cheap)).straight_through_flops == 0


def test_hand_computed_search_router_and_gate() -> None:
    layer = replace(LAYER, num_codes=5, num_code_slices=3)
    cost = flop_cost(layer)
    # 12 tokens, 3 slices of 2 columns, 5 codes each; router 6 x 4; softmax gate 6 x 2
    assert cost.search_flops == sum(2 * 2 * 5 for _ in range(12) for _ in range(3)) == 720
    assert cost.router_forward_flops == 12 * 2 * 6 * 4
    assert cost.gate_forward_flops == 12 * 2 * 6 * 2
    assert flop_cost(replace(layer, combine="sigmoid")).gate_forward_flops == 12 * 2 * 6
    alone = flop_cost(replace(layer, path="discrete"))
    assert (alone.router_forward_flops, alone.gate_forward_flops) == (0, 0)
    continuous = flop_cost(replace(layer, path="continuous"))
    assert (continuous.search_flops, continuous.gate_forward_flops) == (0, 0)


def test_hand_computed_low_dim() -> None:
    # 12 tokens of 6 columns, 5 codes of 2; one row through the projection takes 2 * 2 * 6
    layer = replace(LAYER, num_codes=5, code_dim=2, expert_tensor_parallel_size=2)
    tokens = flop_cost(layer)
    assert tokens.search_flops == 12 * (2 * 2 * 5 + 24)
    assert tokens.lift_flops == 12 * 24
    assert tokens.projection_backward_flops == (12 + 12) * 24  # down, and on to the tokens
    in_code_space = replace(layer, execution="code_space", table_per_step=True)
    code_space = flop_cost(in_code_space)
    assert code_space.lift_flops == 5 * 24
    assert code_space.projection_backward_flops == (2 * 12 + 12) * 24  # both shards' rows
    group = flop_cost(replace(in_code_space, straight_through="group"))
    assert group.projection_backward_flops == (2 * 5 + 12) * 24
    learned = flop_cost(replace(in_code_space, code_input="learned"))
    assert (learned.lift_flops, learned.projection_backward_flops) == (0, (12 + 12) * 24)
    none = flop_cost(replace(layer, straight_through="none"))
    assert none.projection_backward_flops == 12 * 24  # of the commitment loss
    every = flop_cost(replace(in_code_space, table_per_step=False))
    rows = every.code_rows_forward_flops + every.code_rows_backward_flops
    assert every.step_flops(4) - code_space.step_flops(4) == 3 * (rows + 5 * 24)


def test_passes_sum_to_a_step() -> None:
    layer = replace(LAYER, execution="code_space", num_codes=8, table_per_step=True)
    once, every = flop_cost(layer), flop_cost(replace(layer, table_per_step=False))
    assert once.microbatch_flops == every.microbatch_flops
    assert every.step_flops(4) == 4 * (every.forward_flops + every.backward_flops)
    forward, backward = walk(layer, 1, 8, needs_input=True)
    assert every.step_flops(4) - once.step_flops(4) == 3 * (forward + backward)


def test_passes_hold_all_parts() -> None:
    # 12 tokens; one routed row each 2 * 2 * 6 * 20 = 480; 4 code rows; K = 4, N = 4, gate of 2
    cost = flop_cost(replace(LAYER, execution="code_space", num_codes=4))
    small = 12 * 12 * 4 + 12 * 12 * 2  # router and gate, forward
    assert cost.forward_flops == 12 * 480 + 4 * 480 + 12 * 12 * 4 + small
    straight_through = 12 * 480 + 4 * 240
    assert cost.backward_flops == 2 * (12 * 480 + 4 * 480 + small) + straight_through


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("norm", "needs_input"), [("none", False), ("separate", True)])
def test_torch_counts_the_same_for_code_rows(gated: bool, norm: str, needs_input: bool) -> None:
    layer = replace(
        LAYER, gated_linear_unit=gated, execution="code_space", path="discrete", norm=norm,
        straight_through="none", num_codes=9,
    )  # fmt: skip
    rows = torch.randn(9, layer.hidden_size, requires_grad=needs_input)
    fc1 = torch.nn.Linear(layer.hidden_size, layer.fc1_width)
    fc2 = torch.nn.Linear(layer.moe_ffn_hidden_size, layer.hidden_size)
    with FlopCounterMode(display=False) as counter:
        hidden = fc1(rows)
        if gated:
            gate, up = hidden.chunk(2, dim=-1)
            hidden = torch.nn.functional.silu(gate) * up
        out = fc2(torch.relu(hidden))
        forward = counter.get_total_flops()
        out.sum().backward()
    cost = flop_cost(layer)
    assert cost.code_rows_forward_flops == forward
    assert cost.code_rows_backward_flops == counter.get_total_flops() - forward
