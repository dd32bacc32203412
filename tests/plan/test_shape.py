"""The derived sizes of a layer against rows walked one by one, and what is refused."""

from __future__ import annotations

from itertools import product

import pytest
from layer_shapes import changed, shape
from owners import owner_of_code, owner_rank

from vqmoe_megatron.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig, VQConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.shape import LayerShape

LAYER = shape(num_local_tokens=10, hidden_size=12, moe_ffn_hidden_size=8, num_moe_experts=4)


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
    layer = changed(
        LAYER,
        hidden_size=12,
        num_moe_experts=num_experts,
        expert_model_parallel_size=ranks,
        num_codes=num_codes,
        num_code_slices=num_slices,
        execution="code_space",
    )
    assert [layer.num_code_rows_of(rank) for rank in range(ranks)] == owned
    assert layer.num_slots == max(owned)
    assert changed(layer, execution="tokens").num_slots == 0


@pytest.mark.parametrize("code_map", ["balanced", "clustered"])
def test_slots_of_equal_maps_are_an_equal_share(code_map: str) -> None:
    # 2 slices of 6 codes over 4 experts: 3 rows each, in any order; 2 experts per rank
    expert_of_row = [2, 0, 1, 3, 3, 0, 1, 2, 2, 3, 1, 0]
    owned = [0, 0]
    for expert in expert_of_row:
        owned[owner_rank(expert, 4, 2)] += 1
    layer = changed(
        LAYER,
        code_map=code_map,
        num_codes=6,
        num_code_slices=2,
        expert_model_parallel_size=2,
        execution="code_space",
    )
    assert owned == [layer.num_slots] * 2 == [6, 6]


def test_rows_of_each_path() -> None:
    layer = changed(LAYER, moe_router_topk=2, num_code_slices=3)
    assert (layer.num_continuous_rows, layer.num_discrete_rows) == (20, 30)
    assert layer.num_dispatched_rows == 50
    assert changed(layer, path="discrete").num_dispatched_rows == 30
    assert changed(layer, path="continuous").num_dispatched_rows == 20
    assert changed(layer, execution="code_space").num_dispatched_rows == 20
    assert changed(layer, execution="code_space", path="discrete").num_dispatched_rows == 0


def test_widths() -> None:
    assert LAYER.fc1_width == 8
    assert changed(LAYER, gated_linear_unit=True).fc1_width == 16
    assert changed(LAYER, num_code_slices=3).straight_through_width == 4
    assert changed(LAYER, num_code_slices=3, code_input="learned").straight_through_width == 12
    assert [changed(LAYER, bytes_per_element=b).sum_bytes_per_element for b in (2, 4, 8)] == [
        4,
        4,
        8,
    ]


def test_low_dim_codes_go_back_narrow_and_in_full_precision() -> None:
    layer = changed(LAYER, code_dim=5, bytes_per_element=2)
    assert (layer.code_width, layer.straight_through_width) == (5, 5)
    assert layer.straight_through_bytes_per_element == 4
    assert changed(layer, bytes_per_element=8).straight_through_bytes_per_element == 8
    learned = changed(layer, code_input="learned")  # travels whole, is lowered at home
    assert (learned.code_width, learned.straight_through_width) == (5, 12)
    assert learned.straight_through_bytes_per_element == 2
    sliced = changed(LAYER, num_code_slices=3, bytes_per_element=2)
    assert (sliced.code_width, sliced.straight_through_bytes_per_element) == (4, 2)


def test_only_a_discrete_path_of_bare_codes_has_rows_without_gradient() -> None:
    bare = changed(LAYER, path="discrete", norm="none", straight_through="none")
    assert not bare.dispatched_rows_need_gradient and not bare.code_rows_need_gradient
    assert not changed(bare, straight_through="identity").dispatched_rows_need_gradient
    assert changed(bare, straight_through="token").dispatched_rows_need_gradient
    assert not changed(bare, straight_through="token").code_rows_need_gradient
    own_inputs = changed(bare, expert_input="token", straight_through="token")
    assert own_inputs.dispatched_rows_need_gradient
    for changes in ({"norm": "shared"}, {"code_input": "learned"}, {"path": "dual"}):
        layer = changed(bare, **changes)
        assert layer.dispatched_rows_need_gradient and layer.code_rows_need_gradient
    own_table = changed(bare, path="dual", execution="code_space", table_per_step=True)
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
    assert LayerShape.from_config(config, layout) == LayerShape(
        vq=config.vq, num_local_tokens=3 * 128 // 2, hidden_size=64, moe_ffn_hidden_size=96,
        num_moe_experts=8, moe_router_topk=2, gated_linear_unit=True, bytes_per_element=2,
        expert_model_parallel_size=2, expert_tensor_parallel_size=2, tensor_model_parallel_size=2,
        num_microbatches=24 // (3 * 2),
    )  # fmt: skip
    assert LayerShape.from_config(config, layout).vq.in_code_space


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "both"}, "vq.path='both' is not legal; choose one of dual, discrete, continuous"),
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
        ({"num_code_slices": 5}, "hidden_size % vq.num_code_slices != 0: 12 % 5 = 2"),
        ({"code_dim": 0}, "code_dim=0 must be at least 1"),
        ({"code_dim": 13}, "code_dim <= hidden_size fails: 13 > 12"),
        ({"code_dim": 4, "num_code_slices": 3}, "low_dim gives one code per token"),
        ({"code_map": "balanced", "num_codes": 6}, "6 % 4 = 2"),
        ({"execution": "code_space", "path": "continuous"}, "vq.path=continuous has no codes"),
        (
            {"execution": "code_space", "expert_input": "blend"},
            "every token has its own expert input",
        ),
        (
            {"expert_input": "token", "code_input": "learned"},
            "learned vectors stand in",
        ),
        ({"path": "discrete", "num_codes": 3}, "leaves 1 of 4 experts"),
        ({"table_per_step": True}, "code space needs a discrete path"),
    ],
)
def test_impossible_layer_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        changed(LAYER, **changes)
    assert message in str(error.value)
