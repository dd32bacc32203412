"""Saved bytes against rows walked one by one and the design's table; parameters against a layer."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from tiny_layer import FFN, HIDDEN, NUM_EXPERTS, draw_parameters

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.memory_cost import layer_parameters, saved_bytes
from vqmoe_megatron.plan.ownership import owner_of_code

LAYER = LayerShape(num_local_tokens=12, hidden_size=6, moe_ffn_hidden_size=20, num_moe_experts=4)


def walk(layer: LayerShape, shards: int, num_rows: int) -> int:
    """Bytes of input, fc1 output and fc2 input of so many rows on one shard."""
    cut = layer.moe_ffn_hidden_size // shards
    halves = 2 if layer.gated_linear_unit else 1
    tensors = [layer.hidden_size, *[cut] * halves, cut]
    return sum(width * layer.bytes_per_element for _ in range(num_rows) for width in tensors)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("ranks", "shards"), list(product((1, 2, 4), (1, 2))))
def test_saved_rows(gated: bool, ranks: int, shards: int) -> None:
    layer = replace(
        LAYER, gated_linear_unit=gated, moe_router_topk=2, num_codes=7, num_code_slices=3,
        bytes_per_element=2, expert_model_parallel_size=ranks, expert_tensor_parallel_size=shards,
    )  # fmt: skip
    tokens = saved_bytes(layer)
    assert tokens.saved_bytes == tokens.peak_bytes == walk(layer, shards, shards * 12 * (2 + 3))

    owned = [0] * ranks
    for row in range(21):
        owned[owner_of_code(row, 4, ranks)] += 1
    code_space = saved_bytes(replace(layer, execution="code_space", straight_through="none"))
    assert code_space.dispatched_rows_bytes == walk(layer, shards, shards * 12 * 2)
    assert code_space.code_rows_bytes == walk(layer, shards, max(owned))
    assert code_space.table_bytes == sum(6 * 4 for _ in range(ranks) for _ in range(max(owned)))
    assert code_space.code_ids_bytes == 12 * 3 * 8
    assert code_space.peak_bytes == code_space.saved_bytes == (
        code_space.dispatched_rows_bytes + code_space.code_rows_bytes + code_space.table_bytes
        + code_space.code_ids_bytes
    )  # fmt: skip


def test_gradients_to_tokens_are_transient() -> None:
    layer = replace(LAYER, execution="code_space", path="discrete", gated_linear_unit=True)
    none = saved_bytes(replace(layer, straight_through="none"))
    token = saved_bytes(replace(layer, straight_through="token"))
    assert token.saved_bytes == none.saved_bytes
    assert token.peak_bytes - token.saved_bytes == 12 * 40 * 4  # T c1 F b
    group = saved_bytes(replace(layer, straight_through="group", expert_model_parallel_size=2))
    assert group.peak_bytes - group.saved_bytes == 2 * 32 * 40 * 4  # 64 codes on 2 ranks


def test_the_design_table_holds() -> None:
    # bf16, T 4096, h 64, f 128, K 64 on 4 ranks: T b (h + 2 f) and K/P b (h + 2 f) + 4 K h + 8 T
    layer = LayerShape(
        num_local_tokens=4096, hidden_size=64, moe_ffn_hidden_size=128, num_moe_experts=8,
        bytes_per_element=2, expert_model_parallel_size=4, path="discrete", num_codes=64,
    )  # fmt: skip
    assert saved_bytes(layer).saved_bytes == 4096 * 2 * 320
    in_code_space = saved_bytes(replace(layer, execution="code_space"))
    assert in_code_space.saved_bytes == 16 * 2 * 320 + 64 * 64 * 4 + 8 * 4096


@pytest.mark.parametrize("path", ["dual", "discrete", "continuous"])
@pytest.mark.parametrize("norm", ["none", "shared", "separate"])
@pytest.mark.parametrize(
    ("gated", "bias", "normalization", "combine", "slices"),
    [(False, True, "LayerNorm", "softmax", 1), (True, False, "RMSNorm", "sigmoid", 4)],
)
def test_parameters_are_those_of_a_layer(
    path: str, norm: str, gated: bool, bias: bool, normalization: str, combine: str, slices: int
) -> None:
    vq = VQConfig(
        num_codes=10, num_code_slices=slices, quantizer="product", path=path, norm=norm,
        combine=combine,
    )  # fmt: skip
    drawn = draw_parameters(vq, gated=gated, bias=bias, normalization=normalization)
    count = layer_parameters(
        LayerShape(
            num_local_tokens=1, hidden_size=HIDDEN, moe_ffn_hidden_size=FFN,
            num_moe_experts=NUM_EXPERTS, num_codes=10, num_code_slices=slices,
            gated_linear_unit=gated, add_bias_linear=bias, normalization=normalization, path=path,
            norm=norm, combine=combine,
        )
    )  # fmt: skip
    sizes = {name: tensor.numel() for name, tensor in drawn.items()}
    assert count.total == sum(sizes.values())
    for part, prefix in {
        "experts": "experts.", "router": "router.", "gate": "gate.", "codebook": "assigner.",
    }.items():  # fmt: skip
        assert getattr(count, part) == sum(
            n for name, n in sizes.items() if name.startswith(prefix)
        )


@pytest.mark.parametrize("code_input", ["codebook", "learned"])
def test_low_dim_codes_are_narrow_and_its_projection_is_no_parameter(code_input: str) -> None:
    vq = VQConfig(num_codes=10, quantizer="low_dim", code_dim=3, code_input=code_input)
    sizes = {name: tensor.numel() for name, tensor in draw_parameters(vq).items()}
    count = layer_parameters(
        LayerShape(
            num_local_tokens=1, hidden_size=HIDDEN, moe_ffn_hidden_size=FFN,
            num_moe_experts=NUM_EXPERTS, num_codes=10, code_dim=3, code_input=code_input,
        )
    )  # fmt: skip
    assert count.codebook == sizes["assigner.codebook.codes"] == 10 * 3
    assert count.total == sum(sizes.values()) - sizes["assigner.codebook.projection"]


def test_active_parameters() -> None:
    # an expert: 6 * 20 + 20 + 20 * 6 + 6 = 266; router 4 * 7; gate 2 * 7; codes 3 * 6; norms 2 * 12
    layer = replace(LAYER, moe_router_topk=2, num_codes=3)
    count = layer_parameters(layer)
    assert count.experts == 4 * 266
    rest = 28 + 14 + 18 + 24
    assert count.total == 4 * 266 + rest
    assert count.active_per_token == (2 + 1) * 266 + rest
    assert layer_parameters(replace(layer, path="continuous")).active_per_token == 2 * 266 + 28
    more_rows_than_experts = layer_parameters(replace(layer, num_code_slices=3))  # 2 + 3 of 4
    assert more_rows_than_experts.active_experts == more_rows_than_experts.experts == 4 * 266


def test_learned_inputs_are_full_width_and_read_per_code() -> None:
    layer = replace(LAYER, num_codes=5, num_code_slices=3, code_input="learned", path="discrete")
    plain, learned = (
        layer_parameters(replace(layer, code_input="codebook")),
        layer_parameters(layer),
    )
    assert learned.total - plain.total == 3 * 5 * 6
    assert learned.active_per_token - plain.active_per_token == 3 * 6
