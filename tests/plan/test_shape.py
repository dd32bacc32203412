"""The derived sizes of a layer against rows walked one by one, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from owners import owner_of_code, owner_rank

from vqmoe_megatron.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig, VQConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.shape import LayerShape

LAYER = LayerShape(num_local_tokens=10, hidden_size=12, moe_ffn_hidden_size=8, num_moe_experts=4)


@pytest.mark.parametrize(
    ("num_experts", "ranks", "num_codes", "num_slices"),
    [c for c in product((1, 4, 6, 8), (1, 2, 3, 4, 8), (1, 2, 5, 7, 64), (1, 2, 3))
     if c[0] % c[1] == 0],
)  # fmt: skip
def test_slots_of_the_mod_map_are_the_rows_of_the_fullest_rank(
    num_experts: int, ranks: int, num_codes: int, num_slices: int
) -> None:
    owned = [0] * ranks
    for piece in range(num_slices):
        for code in range(num_codes):
            owned[owner_of_code(piece * num_codes + code, num_experts, ranks)] += 1
    layer = replace(
        LAYER,
        hidden_size=12,
        num_moe_experts=num_experts,
        expert_model_parallel_size=ranks,
        num_codes=num_codes,
        num_code_slices=num_slices,
    )
    assert layer.num_slots == max(owned)


@pytest.mark.parametrize("code_map", ["balanced", "clustered"])
def test_slots_of_equal_maps_are_an_equal_share(code_map: str) -> None:
    # 2 slices of 6 codes over 4 experts: 3 rows each, in any order; 2 experts per rank
    expert_of_row = [2, 0, 1, 3, 3, 0, 1, 2, 2, 3, 1, 0]
    owned = [0, 0]
    for expert in expert_of_row:
        owned[owner_rank(expert, 4, 2)] += 1
    layer = replace(
        LAYER, code_map=code_map, num_codes=6, num_code_slices=2, expert_model_parallel_size=2
    )
    assert owned == [layer.num_slots] * 2 == [6, 6]


def test_rows_of_each_path() -> None:
    layer = replace(LAYER, moe_router_topk=2, num_code_slices=3)
    assert (layer.num_continuous_rows, layer.num_discrete_rows) == (20, 30)
    assert layer.num_dispatched_rows == 50
    assert replace(layer, path="discrete").num_dispatched_rows == 30
    assert replace(layer, path="continuous").num_dispatched_rows == 20
    assert replace(layer, execution="code_space").num_dispatched_rows == 20
    assert replace(layer, execution="code_space", path="discrete").num_dispatched_rows == 0


def test_widths() -> None:
    assert LAYER.fc1_width == 8
    assert replace(LAYER, gated_linear_unit=True).fc1_width == 16
    assert replace(LAYER, num_code_slices=3).straight_through_width == 4
    assert replace(LAYER, num_code_slices=3, code_input="learned").straight_through_width == 12
    assert [replace(LAYER, bytes_per_element=b).sum_bytes_per_element for b in (2, 4, 8)] == [
        4,
        4,
        8,
    ]


def test_low_dim_codes_go_back_narrow_and_in_full_precision() -> None:
    layer = replace(LAYER, code_dim=5, bytes_per_element=2)
    assert (layer.code_width, layer.straight_through_width) == (5, 5)
    assert layer.straight_through_bytes_per_element == 4
    assert replace(layer, bytes_per_element=8).straight_through_bytes_per_element == 8
    learned = replace(layer, code_input="learned")  # travels whole, is lowered at home
    assert (learned.code_width, learned.straight_through_width) == (5, 12)
    assert learned.straight_through_bytes_per_element == 2
    sliced = replace(LAYER, num_code_slices=3, bytes_per_element=2)
    assert (sliced.code_width, sliced.straight_through_bytes_per_element) == (4, 2)


def test_only_a_discrete_path_of_bare_codes_has_rows_without_gradient() -> None:
    bare = replace(LAYER, path="discrete", norm="none", straight_through="none")
    assert not bare.dispatched_rows_need_gradient and not bare.code_rows_need_gradient
    assert not replace(bare, straight_through="identity").dispatched_rows_need_gradient
    assert replace(bare, straight_through="token").dispatched_rows_need_gradient
    assert not replace(bare, straight_through="token").code_rows_need_gradient
    assert replace(bare, expert_input="token").dispatched_rows_need_gradient
    for changes in ({"norm": "shared"}, {"code_input": "learned"}, {"path": "dual"}):
        layer = replace(bare, **changes)
        assert layer.dispatched_rows_need_gradient and layer.code_rows_need_gradient
    own_table = replace(bare, path="dual", execution="code_space", table_per_step=True)
    assert not own_table.code_rows_need_gradient  # evaluated without the continuous rows


def test_a_recipe_becomes_a_layer() -> None:
    config = RunConfig(
        model=ModelConfig(
            hidden_size=64, moe_ffn_hidden_size=96, num_moe_experts=8, moe_router_topk=2,
            seq_length=128, bf16=True, gated_linear_unit=True, add_bias_linear=False,
            normalization="RMSNorm",
        ),
        vq=VQConfig(
            num_codes=32, num_code_slices=2, quantizer="product", path="discrete", norm="shared",
            combine="sigmoid", straight_through="group", code_map="balanced", code_input="learned",
            table_per_step=True,
        ),
        parallel=ParallelConfig(
            tensor_model_parallel_size=2, expert_model_parallel_size=2,
            expert_tensor_parallel_size=2,
        ),
        train=TrainConfig(global_batch_size=24, micro_batch_size=3),
    )  # fmt: skip
    layout = ParallelLayout.from_config(config, 4)  # TP 2, DP 2, EP 2, ETP 2
    layer = LayerShape.from_config(config, layout)
    assert layer == LayerShape(
        num_local_tokens=3 * 128 // 2, hidden_size=64, moe_ffn_hidden_size=96, num_moe_experts=8,
        moe_router_topk=2, num_codes=32, num_code_slices=2, gated_linear_unit=True,
        add_bias_linear=False, normalization="RMSNorm", bytes_per_element=2,
        expert_model_parallel_size=2, expert_tensor_parallel_size=2, tensor_model_parallel_size=2,
        num_microbatches=24 // (3 * 2), path="discrete", execution="code_space",
        straight_through="group", expert_input="code", code_input="learned",
        code_map="balanced", norm="shared", combine="sigmoid", table_per_step=True,
    )  # fmt: skip


def test_a_recipe_of_low_dim_becomes_a_layer() -> None:
    config = replace(RunConfig(), vq=VQConfig(quantizer="low_dim", code_dim=32))
    assert LayerShape.from_config(config, ParallelLayout.from_config(config, 1)).code_dim == 32


@pytest.mark.parametrize(
    ("vq", "execution"),
    [
        (VQConfig(), "code_space"),
        (VQConfig(execution="tokens"), "tokens"),
        (VQConfig(expert_input="blend"), "tokens"),
        (VQConfig(path="continuous"), "tokens"),
    ],
)
def test_auto_is_resolved_as_the_layer_does(vq: VQConfig, execution: str) -> None:
    config = replace(RunConfig(), vq=vq)
    layout = ParallelLayout.from_config(config, 1)
    assert LayerShape.from_config(config, layout).execution == execution


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "both"}, "path='both': choose one of dual, discrete, continuous"),
        ({"num_codes": 0}, "num_codes=0 must be at least 1"),
        ({"num_local_tokens": -1}, "num_local_tokens=-1 must be at least 0"),
        (
            {"expert_model_parallel_size": 3},
            "num_moe_experts % expert_model_parallel_size != 0: 4 % 3 = 1",
        ),
        (
            {"expert_tensor_parallel_size": 3},
            "moe_ffn_hidden_size % expert_tensor_parallel_size != 0: 8 % 3 = 2",
        ),
        ({"num_code_slices": 5}, "hidden_size % num_code_slices != 0: 12 % 5 = 2"),
        ({"code_dim": 0}, "code_dim=0 must be at least 1"),
        ({"code_dim": 13}, "code_dim <= hidden_size fails: 13 > 12"),
        ({"code_dim": 4, "num_code_slices": 3}, "low_dim gives one code per token"),
        ({"code_map": "balanced", "num_codes": 6}, "6 % 4 = 2"),
        ({"execution": "code_space", "path": "continuous"}, "needs a discrete path"),
        ({"execution": "code_space", "expert_input": "blend"}, "needs expert_input=code"),
        ({"expert_input": "token", "code_input": "learned"}, "learned needs expert_input=code"),
        ({"table_per_step": True}, "table_per_step needs execution=code_space"),
    ],
)
def test_impossible_layer_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        replace(LAYER, **changes)
    assert message in str(error.value)
