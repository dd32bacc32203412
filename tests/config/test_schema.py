"""The rules each recipe section checks by itself, and the messages that name them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import pytest

from vqmoe_megatron.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerSection,
    ParallelConfig,
    RunConfig,
    TrackingConfig,
    TrainConfig,
    VQConfig,
)
from vqmoe_megatron.config.vq import LEGAL_VQ_VALUES


def test_defaults_are_legal_and_defaults_of_choices_are_listed() -> None:
    config = RunConfig()
    for name, legal in LEGAL_VQ_VALUES.items():
        assert getattr(config.vq, name) in legal


def test_two_recipes_share_no_section() -> None:
    first, second = RunConfig(), RunConfig()
    first.train.seed = 99
    assert second.train.seed == 1234


def test_vq_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        VQConfig().num_codes = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", LEGAL_VQ_VALUES)
def test_unknown_choice_lists_the_legal_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"vq.{name}='nonsense' is not legal") as caught:
        VQConfig(**{name: "nonsense"})
    assert ", ".join(LEGAL_VQ_VALUES[name]) in str(caught.value)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        (VQConfig, {"num_codes": 0}, "vq.num_codes=0 must be at least 1"),
        (VQConfig, {"commitment_coeff": -0.1}, "vq.commitment_coeff=-0.1 must be at least 0"),
        (VQConfig, {"contribution_rate": 1.5}, "contribution_rate=1.5 must be .* at most 1"),
        (VQConfig, {"ema_decay": 1.0}, "ema_decay=1.0 must be above 0 and below 1"),
        (VQConfig, {"dead_code_threshold": 1.0}, "dead_code_threshold=1.0 must be .* below 1"),
        (VQConfig, {"num_code_slices": 2}, "num_code_slices=2 needs vq.quantizer=product"),
        (
            VQConfig,
            {"freeze_codebook": True, "freeze_after_steps": 9},
            "vq.freeze_codebook=true freezes from the start and vq.freeze_after_steps=9 later",
        ),
        (VQConfig, {"freeze_after_steps": 0}, "vq.freeze_after_steps=0 must be at least 1"),
        (
            VQConfig,
            {"revival": "error", "codebook_update": "reanchor"},
            "vq.revival=error cannot work here: vq.codebook_update=reanchor",
        ),
        (
            VQConfig,
            {"revival": "error", "dead_code_threshold": 0.0},
            "vq.revival=error cannot work here: vq.dead_code_threshold=0",
        ),
        (
            VQConfig,
            {"revival": "error", "freeze_codebook": True},
            "vq.revival=error cannot work here: vq.freeze_codebook=true",
        ),
        (
            VQConfig,
            {"execution": "code_space", "path": "continuous"},
            "vq.path=continuous has no codes for vq.execution=code_space",
        ),
        (
            VQConfig,
            {"straight_through": "none", "expert_input": "blend"},
            "vq.straight_through=none is for vq.expert_input=code",
        ),
        (
            VQConfig,
            {"code_dim": 8},
            "vq.code_dim=8 with vq.quantizer=euclidean: low_dim needs",
        ),
        (VQConfig, {"quantizer": "low_dim"}, "vq.code_dim=None with vq.quantizer=low_dim"),
        (
            VQConfig,
            {"execution": "code_space", "expert_input": "blend"},
            "with vq.expert_input=blend every token has its own expert input",
        ),
        (
            VQConfig,
            {"execution": "code_space", "expert_input": "token"},
            "with vq.expert_input=token every token has its own expert input",
        ),
        (
            VQConfig,
            {"code_input": "learned", "expert_input": "blend"},
            "code_input=learned with vq.expert_input=blend: learned vectors stand in the place",
        ),
        (
            VQConfig,
            {"code_input": "learned", "expert_input": "token"},
            "code_input=learned with vq.expert_input=token: learned vectors stand in the place",
        ),
        (
            VQConfig,
            {"table_per_step": True, "execution": "tokens"},
            "this layer has none: vq.path=dual, vq.execution=tokens, vq.expert_input=code;",
        ),
        (
            VQConfig,
            {"table_per_step": True, "expert_input": "blend"},
            "this layer has none: vq.path=dual, vq.execution=auto, vq.expert_input=blend;",
        ),
        (
            VQConfig,
            {"table_per_step": True, "path": "continuous"},
            "this layer has none: vq.path=continuous, vq.execution=auto, vq.expert_input=code;",
        ),
        (ModelConfig, {"hidden_size": 24}, r"rope turns .* % 2 != 0: 3 % 2 = 1"),
        (ModelConfig, {"kv_channels": 7}, "use learned_absolute"),
        (ModelConfig, {"hidden_size": 65}, "hidden_size % num_attention_heads != 0: 65 % 8 = 1"),
        (ModelConfig, {"num_layers": 0}, "model.num_layers=0 must be at least 1"),
        (
            ModelConfig,
            {"moe_router_topk": 17},
            "moe_router_topk=17 exceeds model.num_moe_experts=16",
        ),
        (ModelConfig, {"moe_router_pre_softmax": False}, "needs model.moe_router_pre_softmax=true"),
        (ModelConfig, {"norm_placement": "behind"}, "choose one of pre, post"),
        (ModelConfig, {"activation_func": "tanh"}, "choose one of gelu, relu, silu"),
        (ModelConfig, {"moe_router_dtype": "bf16"}, "choose one of fp32, fp64"),
        (ModelConfig, {"transformer_impl": "te"}, "choose one of auto, local, transformer_engine"),
        (ModelConfig, {"fp8": "e5m2"}, "choose one of hybrid, e4m3"),
        (ModelConfig, {"fp8_recipe": "delayed"}, "choose one of tensorwise, blockwise, mxfp8"),
        (ModelConfig, {"recompute_granularity": "half"}, "choose one of full, selective"),
        (ModelConfig, {"hidden_dropout": 1.0}, "hidden_dropout=1.0 must be at least 0 and below 1"),
        (ParallelConfig, {"expert_model_parallel_size": 0}, "expert_model_parallel_size=0"),
        (
            ModelConfig,
            {"moe_shared_expert_intermediate_size": 64},
            "moe_shared_expert_intermediate_size=64 needs model.add_bias_linear=false",
        ),
        (
            ParallelConfig,
            {"virtual_pipeline_model_parallel_size": 0},
            "virtual_pipeline_model_parallel_size=0 must be at least 1",
        ),
        (DataConfig, {"eval_split": "train"}, "choose one of valid, test"),
        (DataConfig, {"eval_stride_tokens": 0}, "data.eval_stride_tokens=0 must be at least 1"),
        (OptimizerSection, {"min_lr": 1.0}, "min_lr=1.0 must not exceed optimizer.lr=0.001"),
        (OptimizerSection, {"overlap_param_gather": True}, "overlap_param_gather needs"),
        (OptimizerSection, {"lr_decay_style": "step"}, "choose one of constant, linear, cosine"),
        (TrainConfig, {"exit_interval": 0}, "train.exit_interval=0 must be at least 1"),
        (TrainConfig, {"device": "tpu"}, "choose one of auto, cpu, cuda"),
        (TrainConfig, {"output_dir": ""}, "train.output_dir is empty; name a directory"),
        (CheckpointConfig, {"keep_last": 0}, "checkpoint.keep_last=0 must be at least 1"),
    ],
)
def test_broken_rule_is_named_with_its_numbers(section, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        section(**changes)


def test_topk_above_one_may_normalise_after_selection() -> None:
    assert ModelConfig(moe_router_topk=2, moe_router_pre_softmax=False).moe_router_topk == 2


def test_a_frozen_router_may_be_weighed_by_its_one_logit() -> None:
    released = ModelConfig(moe_router_pre_softmax=False, moe_router_freeze=True)
    assert released.moe_router_topk == 1


def test_head_size_may_be_given_instead_of_divided() -> None:
    assert ModelConfig(hidden_size=65, kv_channels=16).kv_channels == 16


@pytest.mark.parametrize(
    ("vq", "hidden_size", "num_experts", "message"),
    [
        (VQConfig(quantizer="product", num_code_slices=3), 64, 8, "64 % 3 = 1"),
        (VQConfig(code_map="clustered", num_codes=12), 64, 8, "12 % 8 = 4"),
        (VQConfig(path="discrete", num_codes=6), 64, 8, "leaves 2 of 8 experts without any code"),
    ],
)
def test_vq_is_judged_against_the_model(vq, hidden_size, num_experts, message) -> None:
    with pytest.raises(ValueError, match=message):
        vq.check_model(hidden_size, num_experts)


def test_product_codes_count_over_all_slices() -> None:
    vq = VQConfig(quantizer="product", num_code_slices=2, num_codes=12, code_map="balanced")
    vq.check_model(hidden_size=64, num_experts=8)  # 2 * 12 rows on 8 experts
    VQConfig(num_codes=13).check_model(hidden_size=64, num_experts=8)  # mod takes any count


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:s3cret@host:5000",
        "https://s3cret@host",
        "postgresql://user:s3cret@host/db",
        "http://user:s3cret/more@host",
        "user:s3cret@host:5000",
        "http://user:s3cret@[host",
    ],
)
def test_a_password_in_the_tracking_uri_is_refused_and_not_repeated(uri) -> None:
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        TrackingConfig(mlflow_uri=uri)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "uri", [None, "http://host:5000", "sqlite:////runs/a@b/mlflow.db", "file:///a@b", "runs/a@b"]
)
def test_a_tracking_uri_without_a_password_is_legal(uri) -> None:
    assert TrackingConfig(mlflow_uri=uri).mlflow_uri == uri


def test_tags_have_a_name_and_a_value() -> None:
    assert TrackingConfig(tags=["a=1", "b="]).tags == ["a=1", "b="]
    for wrong in ("a", "=1"):
        with pytest.raises(ValueError, match=f"tracking.tags: write NAME=VALUE, not '{wrong}'"):
            TrackingConfig(tags=[wrong])


@pytest.mark.parametrize(
    "uri",
    ["sqlite:///q?x/mlflow.db", "sqlite:////a?", "sqlite:///a?b=c/m.db", "sqlite:///a?timeout=3&b"],
)
def test_a_sqlite_path_that_would_be_cut_is_refused(uri) -> None:
    with pytest.raises(ValueError, match="write a . of the path as %3F") as caught:
        TrackingConfig(mlflow_uri=uri)
    assert f"tracking.mlflow_uri={uri}" in str(caught.value)


@pytest.mark.parametrize(
    "uri", ["sqlite:////q%3Fx%2Fmlflow.db", "sqlite:///m.db?timeout=30", "http://host/?x/y"]
)
def test_a_quoted_path_and_options_are_legal(uri) -> None:
    assert TrackingConfig(mlflow_uri=uri).mlflow_uri == uri


def test_sections_are_the_documented_ones() -> None:
    assert [section.name for section in fields(RunConfig)] == [
        "model", "vq", "router", "code_memory", "finetune", "vision",
        "parallel", "data", "optimizer", "train", "checkpoint", "tracking",
    ]  # fmt: skip


@pytest.mark.parametrize("code_map", ["balanced", "clustered"])
def test_a_map_built_from_data_needs_an_initialisation_that_sees_data(code_map: str) -> None:
    with pytest.raises(ValueError, match="init=data or kmeans"):
        VQConfig(code_map=code_map, init="uniform")
    assert VQConfig(code_map=code_map, init="data").code_map == code_map


@pytest.mark.parametrize(
    ("settings", "in_code_space"),
    [
        ({}, True),
        ({"execution": "code_space"}, True),
        ({"execution": "code_space", "table_per_step": True}, True),
        ({"execution": "code_space", "path": "discrete", "straight_through": "group"}, True),
        ({"table_per_step": True}, True),
        ({"code_input": "learned"}, True),
        ({"code_input": "learned", "execution": "tokens"}, False),
        ({"execution": "tokens"}, False),
        ({"execution": "tokens", "expert_input": "blend"}, False),
        ({"expert_input": "blend"}, False),  # auto falls back to tokens
        ({"expert_input": "blend_convex"}, False),
        ({"expert_input": "token"}, False),
        ({"path": "continuous"}, False),
    ],
)
def test_code_space_is_taken_where_it_is_exact(settings: dict, in_code_space: bool) -> None:
    assert VQConfig(**settings).in_code_space is in_code_space


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "continuous"}, "no discrete path"),
        ({"num_codes": 8}, "code space: 8 rows, one table per microbatch"),
        ({"num_codes": 8, "table_per_step": True}, "8 rows, one table per step"),
        ({"execution": "tokens"}, "token dispatch (vq.execution=tokens)"),
        ({"expert_input": "blend"}, "token dispatch (vq.expert_input=blend gives"),
    ],
)
def test_a_run_can_say_how_the_discrete_path_is_evaluated(settings: dict, words: str) -> None:
    assert words in VQConfig(**settings).execution_in_words


@pytest.mark.parametrize(
    ("model", "path", "words"),
    [
        ({}, "dual", "16 of width 512, top-1, every 1 layer(s)"),
        ({"moe_router_topk": 2}, "continuous", "16 of width 512, top-2, every 1 layer(s)"),
        (
            {"moe_router_freeze": True},
            "dual",
            "16 of width 512, top-1 of a frozen router, every 1 layer(s)",
        ),
        ({}, "discrete", "16 of width 512, no router, every 1 layer(s)"),
        (
            {"moe_router": "x_moe"},
            "discrete",
            "16 of width 512, no router: model.moe_router=x_moe has no effect, every 1 layer(s)",
        ),
        ({"num_moe_experts": 1}, "dual", "1 of width 512, no router, every 1 layer(s)"),
        (
            {"num_moe_experts": 1, "moe_layer_freq": 2},
            "continuous",
            "1 of width 512 for every token: dense, no router, every 2 layer(s)",
        ),
        (
            {"moe_shared_expert_intermediate_size": 64, "add_bias_linear": False},
            "dual",
            "16 of width 512, top-1, and a shared one of width 64, every 1 layer(s)",
        ),
    ],
)
def test_a_run_can_say_what_its_experts_are(model: dict, path: str, words: str) -> None:
    config = RunConfig(model=ModelConfig(**model), vq=VQConfig(num_codes=32, path=path))
    assert config.experts_in_words == words
