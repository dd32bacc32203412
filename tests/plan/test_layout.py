"""Layout rules: each rule alone, all of them together, and the numbers in the equations."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layout import (
    ParallelLayout,
    check_layout,
    layout_errors,
    minimum_world_size,
)


def config_with(**changes) -> RunConfig:
    """Return the default recipe with ``section__key=value`` changes."""
    config = RunConfig()
    for name, value in changes.items():
        section, key = name.split("__")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


TP = "parallel__tensor_model_parallel_size"
PP = "parallel__pipeline_model_parallel_size"
VPP = "parallel__virtual_pipeline_model_parallel_size"
CP = "parallel__context_parallel_size"
EP = "parallel__expert_model_parallel_size"
ETP = "parallel__expert_tensor_parallel_size"


def test_default_recipe_runs_on_any_divisor_of_its_batch() -> None:
    # global_batch_size 32, micro_batch_size 4: DP may be 1, 2, 4, 8
    assert [world for world in range(1, 10) if not layout_errors(RunConfig(), world)] == [
        1,
        2,
        4,
        8,
    ]


def test_derived_sizes() -> None:
    config = config_with(**{TP: 2, PP: 2, EP: 4})
    layout = check_layout(config, 16, device="cpu")
    assert (layout.data_parallel_size, layout.expert_data_parallel_size) == (4, 2)
    batch = replace(config.train, global_batch_size=32, micro_batch_size=4)
    assert layout.num_microbatches(batch) == 2
    assert layout.sequence_parallel


@pytest.mark.parametrize(
    ("tp", "cp", "pp", "ep", "etp"), list(product((1, 2), (1, 2), (1, 3), (1, 4, 6), (1, 2)))
)
def test_minimum_world_size_is_the_smallest_that_both_grids_tile(tp, cp, pp, ep, etp) -> None:
    config = config_with(**{TP: tp, PP: pp, CP: cp, EP: ep, ETP: etp})
    tiled = [
        world
        for world in range(1, 200)
        if world % (tp * cp * pp) == 0 and world % (ep * etp * pp) == 0
    ]
    assert minimum_world_size(config) == tiled[0]


@pytest.mark.parametrize(
    ("tp", "asked", "resolved"),
    [(1, None, False), (2, None, True), (1, True, False), (2, True, True), (1, False, False)],
)
def test_sequence_parallel_is_resolved(tp: int, asked: bool | None, resolved: bool) -> None:
    config = config_with(**{TP: tp, "parallel__sequence_parallel": asked})
    assert check_layout(config, 2, device="cpu").sequence_parallel is resolved


def test_one_virtual_chunk_is_no_interleaving() -> None:
    layout = check_layout(config_with(**{VPP: 1}), 1, device="cpu")
    assert layout.virtual_pipeline_model_parallel_size is None


# One row per rule: changes to a recipe that otherwise runs, world size, the equation it breaks.
BROKEN = {
    "world_dense": ({TP: 2}, 3, "world_size % (TP * PP * CP = 2 * 1 * 1) != 0: 3 % 2 = 1"),
    "world_expert": ({EP: 4}, 2, "world_size % (EP * ETP * PP = 4 * 1 * 1) != 0: 2 % 4 = 2"),
    "experts": ({"model__num_moe_experts": 6, EP: 4}, 4, "num_moe_experts % EP != 0: 6 % 4 = 2"),
    "heads": (
        {"model__num_attention_heads": 1, TP: 2}, 2,
        "num_attention_heads % TP != 0: 1 % 2 = 1",
    ),
    "groups_tp": (
        {"model__num_query_groups": 2, TP: 4}, 4,
        "num_query_groups % TP != 0: 2 % 4 = 2",
    ),
    "groups": (
        {"model__num_query_groups": 3}, 1,
        "num_attention_heads % num_query_groups != 0: 8 % 3 = 2",
    ),
    "vocab": (
        {"model__make_vocab_size_divisible_by": 3, TP: 2}, 2,
        "make_vocab_size_divisible_by % TP != 0: 3 % 2 = 1",
    ),
    "dense_ffn": (
        {"model__moe_layer_freq": 2, "model__ffn_hidden_size": 99, TP: 2}, 2,
        "ffn_hidden_size % TP != 0: 99 % 2 = 1",
    ),
    "shared_expert": (
        {
            "model__add_bias_linear": False,
            "model__moe_shared_expert_intermediate_size": 99,
            TP: 2,
        },
        2,
        "moe_shared_expert_intermediate_size % TP != 0: 99 % 2 = 1",
    ),
    "layers": ({"model__num_layers": 5, PP: 2}, 2, "num_layers % PP != 0: 5 % 2 = 1"),
    "chunks": (
        {"model__num_layers": 6, PP: 2, VPP: 2}, 2,
        "num_layers % (PP * VPP = 2 * 2) != 0: 6 % 4 = 2",
    ),
    "vpp_without_pp": ({VPP: 2}, 1, "VPP = 2 needs PP > 1: PP = 1"),
    "vpp_microbatches": (
        {PP: 2, VPP: 2, "train__global_batch_size": 12}, 2, "num_microbatches % PP != 0: 3 % 2 = 1",
    ),
    "sequence": ({"model__seq_length": 255, TP: 2}, 2, "seq_length % TP != 0: 255 % 2 = 1"),
    "sp_off": (
        {TP: 2, "parallel__sequence_parallel": False}, 2,
        "sequence_parallel=false with TP = 2",
    ),
    "etp": (
        {"model__moe_ffn_hidden_size": 130, ETP: 2, "model__bf16": False}, 2,
        "moe_ffn_hidden_size % (ETP * 4 = 2 * 4) != 0: 130 % 8 = 2",
    ),
    "gemm": (
        {"model__kv_channels": 32, "model__hidden_size": 258, "model__bf16": False}, 1,
        "hidden_size % 4 != 0: 258 % 4 = 2",
    ),
    "gemm_bf16": (
        {"model__kv_channels": 32, "model__hidden_size": 260, "model__bf16": True}, 1,
        "hidden_size % 8 != 0: 260 % 8 = 4",
    ),
    "etp_bf16": (
        {"model__moe_ffn_hidden_size": 136, ETP: 2, "model__bf16": True}, 2,
        "moe_ffn_hidden_size % (ETP * 8 = 2 * 8) != 0: 136 % 16 = 8",
    ),
    "world_expert_tensor": (
        {EP: 2, ETP: 4}, 4, "world_size % (EP * ETP * PP = 2 * 4 * 1) != 0: 4 % 8 = 4",
    ),
    "batch": ({}, 3, "global_batch_size % (micro_batch_size * DP = 4 * 3) != 0: 32 % 12 = 8"),
    "stride": (
        {"data__eval_stride_tokens": 257}, 1,
        "data.eval_stride_tokens <= model.seq_length fails: 257 > 256",
    ),
    "window": (
        {"data__eval_window_tokens": 257}, 1,
        "data.eval_window_tokens <= model.seq_length fails: 257 > 256",
    ),
    "stride of a window": (
        {"data__eval_window_tokens": 128, "data__eval_stride_tokens": 129}, 1,
        "data.eval_stride_tokens <= data.eval_window_tokens fails: 129 > 128",
    ),
    "shared norm of a block": (
        {"vq__norm": "shared_with_block"}, 1, "set model.norm_placement=post, or vq.norm=shared",
    ),
    "freq": ({"model__moe_layer_freq": 5}, 1, "moe_layer_freq <= num_layers fails: 5 > 4"),
    "vq": ({"vq__code_map": "balanced", "vq__num_codes": 60}, 1, "60 % 16 = 12"),
    "recompute_orphan": ({"model__recompute_method": "block"}, 1, "recompute_method has no effect"),
    "recompute_method": (
        {"model__recompute_granularity": "full", "model__recompute_num_layers": 1}, 1,
        "needs recompute_method uniform or block, not None",
    ),
    "recompute_none": (
        {"model__recompute_granularity": "full", "model__recompute_method": "block"}, 1,
        "1 <= None <= 4 // 1 = 4",
    ),
    "recompute_many": (
        {
            "model__recompute_granularity": "full", "model__recompute_method": "block",
            "model__recompute_num_layers": 3, PP: 2,
        }, 2, "1 <= 3 <= 4 // 2 = 2",
    ),
    "recompute_uniform": (
        {
            "model__recompute_granularity": "full", "model__recompute_method": "uniform",
            "model__recompute_num_layers": 3,
        }, 1, "layers per pipeline chunk % recompute_num_layers != 0: 4 % 3 = 1",
    ),
    "recompute_full_modules": (
        {
            "model__recompute_granularity": "full", "model__recompute_method": "uniform",
            "model__recompute_num_layers": 2, "model__recompute_modules": ["moe"],
        }, 1, "recompute_modules has no effect with recompute_granularity=full",
    ),
    "recompute_selective": (
        {"model__recompute_granularity": "selective", "model__recompute_num_layers": 1}, 1,
        "takes recompute_modules only",
    ),
    "recompute_modules": (
        {
            "model__recompute_granularity": "selective",
            "model__recompute_modules": ["moe", "mla_up_proj"],
        }, 1,
        "recompute_modules mla_up_proj not in this model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN)
def test_one_broken_rule_gives_its_one_equation(rule: str) -> None:
    changes, world_size, equation = BROKEN[rule]
    (error,) = layout_errors(config_with(**changes), world_size, device="cpu")
    assert equation in error


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({TP: 2}, 2),
        ({TP: 2, PP: 2, EP: 2}, 4),
        ({PP: 2, VPP: 2}, 2),
        ({PP: 4, EP: 2}, 8),
        ({EP: 16, "train__global_batch_size": 64}, 16),
        ({ETP: 2}, 2),
        ({ETP: 2, "model__moe_ffn_hidden_size": 136, "model__bf16": False}, 2),
        ({TP: 2, ETP: 4}, 4),
        ({TP: 4, ETP: 2}, 4),
        ({TP: 2, PP: 2, EP: 2, ETP: 2}, 8),
        ({"model__num_query_groups": 4, TP: 4}, 4),
        ({"model__moe_layer_freq": 4}, 1),
        ({"model__recompute_granularity": "selective", "model__recompute_modules": ["moe"]}, 1),
        ({"data__eval_stride_tokens": 256}, 1),
    ],
)
def test_legal_layouts_pass(changes: dict, world_size: int) -> None:
    assert layout_errors(config_with(**changes), world_size, device="cpu") == []


def test_context_parallelism_is_refused_where_only_transformer_engine_has_it() -> None:
    config = config_with(**{CP: 2})
    (on_cuda,) = layout_errors(config, 2, device="cuda")
    assert "context_parallel_size = 2 > 1 on device=cuda" in on_cuda
    assert "Transformer Engine" in on_cuda
    assert layout_errors(config, 2, device="cpu") == []
    assert layout_errors(config_with(**{CP: 2, TP: 2, EP: 4}), 4, device="cpu") == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__seq_length": 34}, "seq_length % (2 * CP = 2 * 2) != 0: 34 % 4 = 2"),
        ({"model__attention_dropout": 0.1}, "attention_dropout=0.1 with context_parallel_size"),
        (
            {"model__calculate_per_token_loss": True, "model__moe_z_loss_coeff": 0.1},
            "TP * CP = 2 > 1",
        ),
    ],
)
def test_what_cut_sequences_do_not_go_with(changes: dict, words: str) -> None:
    (error,) = layout_errors(config_with(**{CP: 2}, **changes), 2, device="cpu")
    assert words in error


def test_all_broken_rules_are_reported_at_once() -> None:
    config = config_with(**{TP: 3, PP: 3, EP: 5, "data__eval_stride_tokens": 1000})
    with pytest.raises(ValueError) as caught:
        check_layout(config, 9, device="cpu")
    lines = str(caught.value).splitlines()
    assert lines[0] == "the recipe cannot run on 9 ranks:"
    starts = [line.removeprefix("  - ").split(" != ")[0].split(" fails")[0] for line in lines[1:]]
    assert starts == [
        "world_size % (EP * ETP * PP = 5 * 1 * 3)",
        "num_attention_heads % TP",
        "make_vocab_size_divisible_by % TP",
        "num_layers % PP",
        "seq_length % TP",
        "data.eval_stride_tokens <= model.seq_length",
        "num_moe_experts % EP",
    ]
    assert "use a multiple of 45 ranks" in lines[1]


def test_a_world_without_ranks_is_refused() -> None:
    for ranks in (0, 2**17 + 1, 10**30):
        words = f"world_size={ranks} must be at least 1 and at most 131072"
        assert layout_errors(RunConfig(), ranks) == [words]


def test_layout_is_frozen() -> None:
    layout = ParallelLayout.from_config(RunConfig(), 1)
    with pytest.raises(AttributeError):
        layout.world_size = 2  # type: ignore[misc]
