"""Which recipes can start as a source's function; each refusal says what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vqmoe_megatron.config import CodeMemoryConfig, ModelConfig, RunConfig, VQConfig
from vqmoe_megatron.upcycle.rules import (
    check_becomes_experts,
    check_same_function,
    check_target,
    output_scale,
)

CONTINUOUS = VQConfig(path="continuous")


@pytest.mark.parametrize(
    "recipe",
    [
        RunConfig(vq=CONTINUOUS),
        RunConfig(vq=CONTINUOUS, code_memory=CodeMemoryConfig(num_rows=64, gate="token")),
        RunConfig(vq=VQConfig(path="dual", combine="sigmoid", norm="separate")),
        RunConfig(vq=VQConfig(path="filled", fill_values="direct")),
    ],
    ids=["experts", "memory", "dual", "filled"],
)
def test_what_can_start_silent(recipe: RunConfig) -> None:
    check_target(recipe)


@pytest.mark.parametrize(
    ("recipe", "way"),
    [
        (RunConfig(vq=VQConfig(path="dual")), "use combine=sigmoid and norm=separate"),
        (
            RunConfig(vq=VQConfig(path="dual", combine="sigmoid", norm="shared")),
            "use combine=sigmoid and norm=separate",
        ),
        (RunConfig(vq=VQConfig(path="discrete")), "use path=continuous with a code memory"),
        (RunConfig(vq=VQConfig(path="filled")), "use fill_values=direct"),
        (
            RunConfig(
                model=ModelConfig(attention="transformer_xl", position_embedding_type="relative"),
                vq=CONTINUOUS,
            ),
            "model.attention=transformer_xl: sources are read",
        ),
        (
            RunConfig(vq=VQConfig(path="filled", num_fill_experts=0, threshold_routing=True)),
            "threshold_routing=false",
        ),
        (
            RunConfig(
                model=ModelConfig(moe_router_topk=2, moe_router_pre_softmax=False),
                vq=VQConfig(path="filled", fill_values="direct"),
            ),
            "use moe_router_pre_softmax=true",
        ),
        (
            RunConfig(vq=CONTINUOUS, code_memory=CodeMemoryConfig(num_rows=64, values="experts")),
            "use values=direct",
        ),
        (RunConfig(model=ModelConfig(bf16=True, fp8="hybrid"), vq=CONTINUOUS), "model.fp8=hybrid"),
    ],
)
def test_what_cannot_says_what_can(recipe: RunConfig, way: str) -> None:
    with pytest.raises(ValueError, match="cannot start as the source's function") as refused:
        check_target(recipe)
    assert way in str(refused.value)


def test_copies_of_one_mlp_add_up_to_it() -> None:
    for topk in (1, 2, 4):
        model = ModelConfig(num_moe_experts=8, moe_router_topk=topk)
        weights = topk * [1.0 / 8]  # of equal experts, before the choice
        assert sum(weights) * output_scale(model) == 1.0
    after = ModelConfig(num_moe_experts=8, moe_router_topk=2, moe_router_pre_softmax=False)
    assert output_scale(after) == 1.0
    assert output_scale(ModelConfig(num_moe_experts=1)) == 1.0


def test_a_router_of_another_kind_has_unknown_weights() -> None:
    check_becomes_experts(ModelConfig())
    model = ModelConfig()
    model.moe_router = "theirs"  # of an installed package
    with pytest.raises(ValueError, match="only moe_router=topk"):
        check_becomes_experts(model)


def changed(recipe: RunConfig, **settings: object) -> RunConfig:
    return replace(recipe, model=replace(recipe.model, **settings))


@pytest.mark.parametrize(
    "setting",
    [
        {"hidden_size": 512},
        {"num_attention_heads": 4},
        {"rotary_base": 100},
        {"activation_func": "silu"},
        {"layernorm_epsilon": 1e-6},
        {"moe_router_pre_softmax": False, "moe_router_topk": 2},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_the_function_must_be_the_sources(setting: dict) -> None:
    source = RunConfig(vq=CONTINUOUS)
    check_same_function(source, source)
    with pytest.raises(ValueError) as refused:
        check_same_function(source, changed(source, **setting))
    for name, value in setting.items():
        assert f"model.{name}: source {getattr(source.model, name)!r}, recipe {value!r}" in str(
            refused.value
        )


def test_a_dense_source_says_nothing_of_routers_nor_rope_of_lengths() -> None:
    dense = changed(RunConfig(vq=CONTINUOUS), num_moe_experts=1)
    target = changed(dense, num_moe_experts=16, moe_router_topk=2, seq_length=64)
    check_same_function(dense, target)
    learned = {"position_embedding_type": "learned_absolute"}
    with pytest.raises(ValueError, match="model.seq_length: source 256, recipe 64"):
        check_same_function(changed(dense, **learned), changed(target, **learned))


def test_a_vqmoe_is_no_source() -> None:
    memory = RunConfig(vq=CONTINUOUS, code_memory=CodeMemoryConfig(num_rows=64))
    for source in (RunConfig(vq=VQConfig(path="dual")), memory):
        with pytest.raises(ValueError, match="the source is a VQMoE already"):
            check_same_function(source, RunConfig(vq=CONTINUOUS))


def test_only_megatrons_own_router_starts_silent() -> None:
    model = ModelConfig(moe_router="x_moe", moe_router_topk=2)
    with pytest.raises(ValueError, match="moe_router=x_moe: upcycling knows moe_router=topk only"):
        check_target(RunConfig(model=model, vq=CONTINUOUS))
