"""Operations against products walked one by one, torch's own counter, and the real model's."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from layer_shapes import changed, shape
from owners import owner_rank
from real_model import measure_flops, recipe
from torch.utils.flop_counter import FlopCounterMode

from vqmoe_megatron.plan.flops import (
    Flops,
    expert_forward_flops,
    layer_flops,
    run_flops,
    search_flops,
    step_flops,
)
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.shape import LayerShape

LAYER = shape(num_local_tokens=12, hidden_size=6, moe_ffn_hidden_size=20, num_moe_experts=4)


def microbatch_of(layer: LayerShape) -> Flops:
    """All parts of a microbatch that evaluates the code rows."""
    return sum(layer_flops(layer).values(), Flops())


def steps(layer: LayerShape, num_microbatches: int) -> int:
    return step_flops(changed(layer, num_microbatches=num_microbatches)).model


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
    layer = changed(
        LAYER, gated_linear_unit=gated, moe_router_topk=3, expert_model_parallel_size=ranks,
        expert_tensor_parallel_size=shards,
    )  # fmt: skip
    # every one of P * E ranks has 12 tokens with 3 + 1 rows; all shards see those of E ranks
    arrived = shards * fullest_rank_rows(layer, ranks * 12 * 4)
    cost = layer_flops(layer)
    assert (cost["dispatched"].forward, cost["dispatched"].backward) == walk(
        layer, shards, arrived, needs_input=True
    )
    assert cost["code_rows"] == cost["straight_through"] == Flops()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("ranks", "shards"), list(product((1, 2, 4), (1, 2))))
@pytest.mark.parametrize(("norm", "needs_input"), [("none", False), ("separate", True)])
def test_code_rows(gated: bool, ranks: int, shards: int, norm: str, needs_input: bool) -> None:
    layer = changed(
        LAYER, gated_linear_unit=gated, execution="code_space", path="discrete", norm=norm,
        straight_through="none", num_codes=7, num_code_slices=3,
        expert_model_parallel_size=ranks, expert_tensor_parallel_size=shards,
    )  # fmt: skip
    cost = layer_flops(layer)
    rows = fullest_rank_rows(layer, 21)
    assert (cost["code_rows"].forward, cost["code_rows"].backward) == walk(
        layer, shards, rows, needs_input
    )
    assert cost["dispatched"] == cost["straight_through"] == Flops()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shards", [1, 2])
def test_gradients_to_tokens(gated: bool, shards: int) -> None:
    layer = changed(
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
    assert layer_flops(layer)["straight_through"].backward == per_token + fc1_again
    # or the sums of 2 ranks per code row
    per_code, _ = walk(layer, shards, shards * 2 * 10, True)
    group = layer_flops(changed(layer, straight_through="group"))
    assert group["straight_through"].backward == per_code + fc1_again
    for cheap in ("identity", "none"):
        assert layer_flops(changed(layer, straight_through=cheap))["straight_through"] == Flops()


def test_hand_computed_search_router_and_gate() -> None:
    layer = changed(LAYER, num_codes=5, num_code_slices=3)
    cost = layer_flops(layer)
    # 12 tokens, 3 slices of 2 columns, 5 codes each; router 6 x 4; softmax gate 6 x 2
    assert cost["search"].forward == sum(2 * 2 * 5 for _ in range(12) for _ in range(3)) == 720
    assert cost["router"].forward == 12 * 2 * 6 * 4
    assert cost["gate"].forward == 12 * 2 * 6 * 2
    assert layer_flops(changed(layer, combine="sigmoid"))["gate"].forward == 12 * 2 * 6
    alone = layer_flops(changed(layer, path="discrete"))
    assert alone["router"] == alone["gate"] == Flops()
    continuous = layer_flops(changed(layer, path="continuous"))
    assert continuous["search"] == continuous["gate"] == Flops()


def test_hand_computed_low_dim() -> None:
    # 12 tokens of 6 columns, 5 codes of 2; one row through the projection takes 2 * 2 * 6
    layer = changed(LAYER, num_codes=5, code_dim=2, expert_tensor_parallel_size=2)
    tokens = layer_flops(layer)
    assert tokens["search"].forward == 12 * (2 * 2 * 5 + 24)
    assert tokens["lift"].forward == 12 * 24
    assert tokens["projection"].backward == (12 + 12) * 24  # down, and on to the tokens
    in_code_space = changed(layer, execution="code_space", table_per_step=True)
    code_space = layer_flops(in_code_space)
    assert code_space["lift"].forward == 5 * 24
    assert code_space["projection"].backward == (2 * 12 + 12) * 24  # both shards' rows
    group = layer_flops(changed(in_code_space, straight_through="group"))
    assert group["projection"].backward == (2 * 5 + 12) * 24
    learned = layer_flops(changed(in_code_space, code_input="learned"))
    assert (learned["lift"], learned["projection"].backward) == (Flops(), (12 + 12) * 24)
    none = layer_flops(changed(layer, straight_through="none"))
    assert none["projection"].backward == 12 * 24  # of the commitment loss
    every_table = changed(in_code_space, table_per_step=False)
    every = layer_flops(every_table)
    rows = every["code_rows"].model
    assert steps(every_table, 4) - steps(in_code_space, 4) == 3 * (rows + 5 * 24)


def test_passes_sum_to_a_step() -> None:
    once = changed(LAYER, execution="code_space", num_codes=8, table_per_step=True)
    every = changed(once, table_per_step=False)
    microbatch = microbatch_of(every)
    assert microbatch_of(once) == microbatch
    assert steps(every, 4) == 4 * (microbatch.forward + microbatch.backward)
    forward, backward = walk(once, 1, 8, needs_input=True)
    assert steps(every, 4) - steps(once, 4) == 3 * (forward + backward)
    # what recompute repeats: the forward passes, without a table that is kept
    assert step_flops(changed(every, num_microbatches=4)).recompute == 4 * microbatch.forward
    again = step_flops(changed(once, num_microbatches=4)).recompute
    assert again == 4 * (microbatch.forward - forward)


def test_passes_hold_all_parts() -> None:
    # 12 tokens; one routed row each 2 * 2 * 6 * 20 = 480; 4 code rows; K = 4, N = 4, gate of 2
    cost = microbatch_of(changed(LAYER, execution="code_space", num_codes=4))
    small = 12 * 12 * 4 + 12 * 12 * 2  # router and gate, forward
    assert cost.forward == 12 * 480 + 4 * 480 + 12 * 12 * 4 + small
    straight_through = 12 * 480 + 4 * 240
    assert cost.backward == 2 * (12 * 480 + 4 * 480 + small) + straight_through


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("norm", "needs_input"), [("none", False), ("separate", True)])
def test_torch_counts_the_same_for_code_rows(gated: bool, norm: str, needs_input: bool) -> None:
    layer = changed(
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
    cost = layer_flops(layer)
    assert cost["code_rows"].forward == forward
    assert cost["code_rows"].backward == counter.get_total_flops() - forward


ONE = ["train.global_batch_size=1", "train.micro_batch_size=1"]
CASES = {
    "dual": [],
    "dense layers, gated, groups": [
        "model.moe_layer_freq=2", "model.gated_linear_unit=true", "model.num_query_groups=2",
    ],
    "recomputed": [
        "vq.path=continuous", "model.recompute_granularity=full",
        "model.recompute_method=uniform", "model.recompute_num_layers=2",
    ],
    "memory that experts make, by contexts": [
        "code_memory.num_rows=16", "code_memory.num_codes=40", "code_memory.values=experts",
        "code_memory.codes=embedding", "code_memory.num_context_codes=10",
        "code_memory.gate=token",
        "code_memory.freeze_after_steps=0",  # a microbatch is counted, without the step's end
    ],
    "memory by hidden states, recomputed": [
        "code_memory.num_rows=16", "code_memory.num_codes=24", "code_memory.codes=hidden",
        "code_memory.layers=[1, 3]", "model.recompute_granularity=selective",
        "model.recompute_modules=[moe]", "vq.path=continuous",
    ],
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_of_the_model(ranks, name: str) -> None:
    overrides = [*CASES[name], *ONE]
    ((forward, backward),) = ranks(1).run(measure_flops, overrides)
    config = recipe(overrides)
    planned = run_flops(config, check_layout(config, 1, "cpu")).all_ranks
    assert (planned.forward, planned.backward + planned.recompute) == (forward, backward)


def test_the_vocabulary_is_searched_once_per_step() -> None:
    memory = ["code_memory.num_rows=16", "code_memory.codes=embedding", "code_memory.num_codes=40"]
    for sizes, ranks in (([], 1), (["parallel.tensor_model_parallel_size=2"], 2)):
        config = recipe([*memory, *sizes])
        layout = check_layout(config, ranks, "cpu")
        found = run_flops(config, layout).by_part["code_stream"]
        assert found == 2 * 384 * 40 * 48  # V K H, of all ranks together
    frozen = recipe([*memory, "code_memory.freeze_after_steps=0"])
    assert run_flops(frozen, check_layout(frozen, 1, "cpu")).by_part["code_stream"] == 0


def test_all_ranks_do_the_same_work_together_at_every_layout() -> None:
    base = ["vq.path=continuous"]  # code space evaluates codes once per replica
    one = recipe(base)
    whole = run_flops(one, check_layout(one, 1, "cpu"))
    for sizes in (
        ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
        ["parallel.expert_model_parallel_size=4"],
        ["parallel.expert_tensor_parallel_size=2"],
    ):
        config = recipe([*base, *sizes])
        cut = run_flops(config, check_layout(config, 4, "cpu"))
        assert cut.all_ranks == whole.all_ranks
        assert cut.by_part == whole.by_part
        assert sum(of_rank.total for of_rank in cut.per_rank) * 4 // len(cut.per_rank) == (
            cut.all_ranks.total
        )
    assert whole.per_token == whole.all_ranks.model / (8 * 16)


def test_selective_recompute_repeats_the_scores() -> None:
    config = recipe(["model.recompute_granularity=selective"])
    flops = run_flops(config, check_layout(config, 1, "cpu")).all_ranks
    assert flops.recompute == 8 * 4 * (4 * 16 * 16 * 48)  # batch, layers, 4 t S A d


TOKENS = 4096
LARGE = shape(
    num_local_tokens=TOKENS, hidden_size=4096, moe_ffn_hidden_size=1024, num_moe_experts=64,
    expert_model_parallel_size=64, path="discrete", straight_through="none",
)  # fmt: skip


def test_code_space_takes_fewer_operations_up_to_p_codes_per_token() -> None:
    for num_codes, wins in (
        (64 * TOKENS - 64, True),
        (64 * TOKENS + 64, False),
    ):  # K / P rows for T
        layer = changed(LARGE, num_codes=num_codes)
        in_code_space = microbatch_of(changed(layer, execution="code_space")).forward
        assert (in_code_space <= microbatch_of(layer).forward) is wins


@pytest.mark.parametrize(
    ("changes", "most_codes"),
    [
        ({}, 64 + 2 * 1024),
        ({"gated_linear_unit": True, "num_code_slices": 4}, 64 + 3 * 1024),
        # a quarter of the columns: four times as many codes, less the projection's H of them
        ({"code_dim": 1024}, 4 * (64 + 2 * 1024) - 4096),
    ],
)
def test_the_search_replaces_a_router_and_an_expert_up_to_n_plus_m_f_codes(
    changes: dict, most_codes: int
) -> None:
    layer = changed(LARGE, **changes)
    router = 2 * layer.hidden_size * layer.num_moe_experts
    replaced = TOKENS * (router + expert_forward_flops(layer))
    assert search_flops(changed(layer, num_codes=most_codes)) <= replaced
    assert search_flops(changed(layer, num_codes=most_codes + 1)) > replaced
