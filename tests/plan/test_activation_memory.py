"""Estimated activations against the tensors that a real model's forward pass saves."""

from __future__ import annotations

from itertools import product

import pytest
from layer_shapes import changed, shape
from owners import owner_of_code
from real_model import measure_activations, recipe

from vqmoe_megatron.plan.activation_memory import (
    activation_bytes,
    chunk_activation_bytes,
    saved_bytes,
)
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.parameters import chunk_places
from vqmoe_megatron.plan.shape import LayerShape

LARGEST_ERROR = 0.03
SIZES = [
    "model.seq_length=64", "train.micro_batch_size=2", "model.hidden_size=64",
    "model.moe_ffn_hidden_size=128",
]  # fmt: skip
FULL = ["model.recompute_granularity=full", "model.recompute_num_layers=2"]
ONE_EXPERT = ["model.num_moe_experts=1", "model.moe_router_topk=1"]
MEMORY = [
    "code_memory.num_rows=512", "code_memory.codes=embedding", "code_memory.num_codes=40",
    "code_memory.max_order=8",
]  # fmt: skip
CASES = {
    "dual": (1, {}, []),
    "continuous": (1, {}, ["vq.path=continuous"]),
    "discrete": (1, {}, ["vq.path=discrete"]),
    "tokens": (1, {}, ["vq.execution=tokens"]),
    "blend": (1, {}, ["vq.expert_input=blend", "vq.path=discrete"]),
    "filled": (1, {}, ["vq.path=filled"]),
    "filled threshold": (
        1,
        {},
        ["vq.path=filled", "vq.threshold_routing=true", "model.moe_router_topk=1"],
    ),
    "filled detached": (1, {}, ["vq.path=filled", "vq.fill_values=detached"]),
    "filled direct, tp2 ep2": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        ["vq.path=filled", "vq.fill_values=direct"],
    ),
    "product": (1, {}, ["vq.quantizer=product", "vq.num_code_slices=4"]),
    "residual": (1, {}, ["vq.quantizer=residual", "vq.num_code_slices=3"]),
    "residual, tokens, bf16": (
        1,
        {},
        [
            "vq.quantizer=residual", "vq.num_code_slices=2", "vq.execution=tokens",
            "model.bf16=true",
        ],
    ),
    "fsq, trained projection": (
        1,
        {},
        [
            "vq.quantizer=fsq", "vq.code_dim=4", "vq.fsq_levels=[3,3,3,3]", "vq.num_codes=81",
            "vq.train_projection=true", "vq.freeze_codebook=true", "vq.init=uniform",
            "vq.codebook_update=gradient",
        ],
    ),
    "lfq": (
        1,
        {},
        [
            "vq.quantizer=lfq", "vq.code_dim=6", "vq.num_codes=64", "vq.freeze_codebook=true",
            "vq.init=uniform", "vq.codebook_update=gradient",
        ],
    ),
    "as released": (
        1,
        {},
        [
            "model.norm_placement=post", "vq.norm=shared_with_block", "vq.expert_input=blend",
            "model.moe_router_freeze=true", "model.moe_router_pre_softmax=false",
            "model.moe_router_topk=1", "vq.codebook_update=gradient",
        ],
    ),
    "bf16 rms gated": (
        1,
        {},
        ["model.bf16=true", "model.normalization=RMSNorm", "model.gated_linear_unit=true"],
    ),
    "dense layers, groups": (1, {}, ["model.num_query_groups=2", "model.moe_layer_freq=2"]),
    "groups, rope": (
        1,
        {},
        ["model.num_query_groups=1", "model.position_embedding_type=rope"],
    ),
    "one text in a microbatch": (1, {}, ["train.micro_batch_size=1", "model.num_query_groups=2"]),
    "selective, one text": (
        1,
        {},
        ["train.micro_batch_size=1", "model.recompute_granularity=selective"],
    ),
    "dropout": (1, {}, ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]),
    "uniform": (1, {}, [*FULL, "model.recompute_method=uniform"]),
    "block": (1, {}, [*FULL, "model.recompute_method=block"]),
    "selective": (1, {}, ["model.recompute_granularity=selective"]),
    "one expert": (1, {}, ["vq.path=continuous", *ONE_EXPERT]),
    "one expert, dual, gated": (1, {}, [*ONE_EXPERT, "model.gated_linear_unit=true"]),
    "shared expert": (
        1,
        {},
        ["model.moe_shared_expert_intermediate_size=256", "model.add_bias_linear=false"],
    ),
    "shared expert, gated, continuous, tp2": (
        2,
        {"tensor_model_parallel_size": 2},
        [
            "model.moe_shared_expert_intermediate_size=256",
            "model.add_bias_linear=false",
            "model.gated_linear_unit=true",
            "vq.path=continuous",
        ],
    ),
    "one expert, etp2": (
        2,
        {"expert_tensor_parallel_size": 2},
        ["vq.path=continuous", *ONE_EXPERT],
    ),
    "memory": (1, {}, ["vq.path=continuous", *MEMORY, "code_memory.gate=token"]),
    "memory that experts make, recomputed": (
        1,
        {},
        [
            *MEMORY,
            "code_memory.values=experts",
            "code_memory.layers=[1, 3]",
            "model.gated_linear_unit=true",
            "model.recompute_granularity=full",
            "model.recompute_method=block",
            "model.recompute_num_layers=1",
        ],
    ),
    "ep2, memory on hidden states": (
        2,
        {"expert_model_parallel_size": 2},
        ["vq.path=continuous", *MEMORY, "code_memory.codes=hidden"],
    ),
    "tp2 ep2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, []),
    "etp2": (2, {"expert_tensor_parallel_size": 2}, ["model.gated_linear_unit=true"]),
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_estimate_is_near_what_is_saved(ranks, name: str) -> None:
    world_size, sizes, overrides = CASES[name]
    overrides = SIZES + overrides + [f"parallel.{axis}={size}" for axis, size in sizes.items()]
    measured = ranks(world_size).run(measure_activations, overrides, layout=sizes)
    config = recipe(overrides)
    layout = check_layout(config, world_size, "cpu")
    (place,) = chunk_places(config.model, layout, 0)
    planned = chunk_activation_bytes(config, place, activation_bytes(config, layout, "cpu"))
    mean = sum(measured) / len(measured)  # experts are not equally loaded
    assert abs(planned / mean - 1) < LARGEST_ERROR, (planned, measured)


def test_only_megatron_s_own_attention_keeps_scores() -> None:
    config = recipe(SIZES)
    layout = check_layout(config, 1, "cpu")
    local, cpu, fused = (activation_bytes(config, layout, k) for k in ("local", "cpu", "fused"))
    assert fused.core_scores == 2 * 4 * 64 * 4  # b A S, fp32
    assert local.core_scores == 2 * 4 * 64 * 64 * 4 + 64 * 64
    assert local.attention - fused.attention == local.core_scores - fused.core_scores
    assert cpu == fused
    dropout = recipe([*SIZES, "model.attention_dropout=0.1"])
    local, cpu = (activation_bytes(dropout, layout, kernels) for kernels in ("local", "cpu"))
    assert cpu == local and cpu.core_scores == 3 * 2 * 4 * 64 * 64 * 4 + 64 * 64
    with pytest.raises(ValueError, match="kernels='flash': choose one of local, cpu, fused"):
        activation_bytes(config, layout, "flash")


LAYER = shape(num_local_tokens=12, hidden_size=6, moe_ffn_hidden_size=20, num_moe_experts=4)


def walk(layer: LayerShape, shards: int, num_rows: int) -> int:
    """Bytes of input, fc1 output and fc2 input of so many rows on one shard."""
    cut = layer.moe_ffn_hidden_size // shards
    halves = 2 if layer.gated_linear_unit else 1
    tensors = [layer.hidden_size, *[cut] * halves, cut]
    return sum(width * layer.bytes_per_element for _ in range(num_rows) for width in tensors)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("ranks", "shards"), list(product((1, 2, 4), (1, 2))))
def test_saved_rows(gated: bool, ranks: int, shards: int) -> None:
    layer = changed(
        LAYER, gated_linear_unit=gated, moe_router_topk=2, num_codes=7, num_code_slices=3,
        bytes_per_element=2, expert_model_parallel_size=ranks, expert_tensor_parallel_size=shards,
    )  # fmt: skip
    tokens = saved_bytes(layer)
    assert tokens.saved_bytes == tokens.peak_bytes == walk(layer, shards, shards * 12 * (2 + 3))

    owned = [0] * ranks
    for row in range(21):
        owned[owner_of_code(row, 4, ranks)] += 1
    code_space = saved_bytes(changed(layer, execution="code_space", straight_through="none"))
    assert code_space.dispatched_rows_bytes == walk(layer, shards, shards * 12 * 2)
    assert code_space.code_rows_bytes == walk(layer, shards, max(owned))
    assert code_space.table_bytes == sum(6 * 4 for _ in range(ranks) for _ in range(max(owned)))
    assert code_space.code_ids_bytes == 12 * 3 * 8
    assert code_space.peak_bytes == code_space.saved_bytes == (
        code_space.dispatched_rows_bytes + code_space.code_rows_bytes + code_space.table_bytes
        + code_space.code_ids_bytes
    )  # fmt: skip


def test_gradients_to_tokens_are_transient() -> None:
    layer = changed(LAYER, execution="code_space", path="discrete", gated_linear_unit=True)
    none = saved_bytes(changed(layer, straight_through="none"))
    token = saved_bytes(changed(layer, straight_through="token"))
    assert token.saved_bytes == none.saved_bytes
    assert token.peak_bytes - token.saved_bytes == 12 * 40 * 4  # T c1 F b
    group = saved_bytes(changed(layer, straight_through="group", expert_model_parallel_size=2))
    assert group.peak_bytes - group.saved_bytes == 2 * 32 * 40 * 4  # 64 codes on 2 ranks


def test_the_design_table_holds() -> None:
    # bf16, T 4096, h 64, f 128, K 64 on 4 ranks: T b (h + 2 f) and K/P b (h + 2 f) + 4 K h + 8 T
    layer = shape(
        num_local_tokens=4096, hidden_size=64, moe_ffn_hidden_size=128, num_moe_experts=8,
        bytes_per_element=2, expert_model_parallel_size=4, path="discrete", num_codes=64,
    )  # fmt: skip
    assert saved_bytes(layer).saved_bytes == 4096 * 2 * 320
    in_code_space = saved_bytes(changed(layer, execution="code_space"))
    assert in_code_space.saved_bytes == 16 * 2 * 320 + 64 * 64 * 4 + 8 * 4096
