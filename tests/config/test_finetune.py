"""What a fine-tuning recipe may ask for, and what its mode makes of the checkpoint's layer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vqmoe_megatron.config import FinetuneConfig, RouterConfig, RunConfig, VQConfig
from vqmoe_megatron.config.finetune import finetune_errors, path_of_mode, tuned_recipe, tuned_vq
from vqmoe_megatron.config.recipe import apply_overrides
from vqmoe_megatron.config.schema import DataConfig
from vqmoe_megatron.plan.layout import layout_errors

SECTION = FinetuneConfig("sst2", "texts", "full", 2)


def tuned(mode: str = "full", stored: RunConfig | None = None) -> RunConfig:
    return tuned_recipe(stored or RunConfig(), "runs/x", replace(SECTION, mode=mode), 64)


@pytest.mark.parametrize(
    ("stored", "mode", "path"),
    [
        ("dual", "full", "dual"), ("dual", "head", "dual"), ("filled", "full", "filled"),
        ("dual", "continuous", "continuous"), ("dual", "discrete", "discrete"),
        ("discrete", "discrete", "discrete"), ("continuous", "head", "continuous"),
        ("continuous", "discrete", None), ("discrete", "continuous", None),
        ("filled", "discrete", None),
    ],
)  # fmt: skip
def test_a_mode_needs_its_path(stored: str, mode: str, path: str | None) -> None:
    if path is not None:
        assert path_of_mode(stored, mode) == path
        return
    with pytest.raises(ValueError, match=f"mode {mode} cannot start .* vq.path={stored}"):
        path_of_mode(stored, mode)


@pytest.mark.parametrize("mode", ["full", "continuous", "discrete", "head"])
def test_a_tuned_recipe_breaks_no_rule(mode: str) -> None:
    assert list(finetune_errors(tuned(mode))) == []


def test_settings_of_a_path_that_is_dropped_go_with_it() -> None:
    vq = VQConfig(execution="code_space", table_per_step=True, freeze_after_steps=9)
    assert tuned_vq(vq, "continuous").execution == "auto"
    assert tuned_vq(vq, "discrete").table_per_step
    assert tuned_vq(vq, "full").freeze_after_steps is None


ROUTERS = {
    "switch": ["model.moe_router=switch"],
    "loss_free": ["model.moe_router=loss_free", "model.moe_router_load_balancing_type=none"],
    "stable_moe": ["model.moe_router=stable_moe"],
    "stable_moe_released": ["model.moe_router=stable_moe", "router.variant=released"],
    "smoe_dropout": [
        "model.moe_router=smoe_dropout",
        "model.moe_router_load_balancing_type=none",
        "model.num_moe_experts=8",
        "model.moe_router_topk=8",
    ],
}


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_s_schedule_goes_on_and_nothing_of_it_counts_filling(name: str) -> None:
    top1 = ["model.moe_router_topk=1", "train.train_iters=400"]
    stored = apply_overrides(RunConfig(), [*top1, *ROUTERS[name]])
    config = tuned(stored=stored)
    config = replace(config, train=replace(config.train, train_iters=60))
    assert not [e for e in layout_errors(config, 1, "cpu") if "router" in e]
    router = config.router
    assert router.schedule_steps == (400 if name == "smoe_dropout" else None)
    assert router.stage_1_steps == (40 if name == "stable_moe" else None)
    default = RouterConfig()
    assert router.capacity_factor == (None if name == "switch" else default.capacity_factor)
    assert router.bias_update_rate == (0 if name == "loss_free" else default.bias_update_rate)
    assert router.distill_coeff == (0 if name == "stable_moe" else default.distill_coeff)


@pytest.mark.parametrize(
    ("name", "override", "said"),
    [
        ("switch", "router.capacity_factor=1.25", "router.capacity_factor=null: texts are"),
        ("loss_free", "router.bias_update_rate=0.001", "router.bias_update_rate=0.0: texts are"),
        ("stable_moe", "router.distill_coeff=1.0", "router.distill_coeff=0.0: texts are"),
    ],
)
def test_a_router_that_would_count_filling_is_refused(name: str, override: str, said: str) -> None:
    stored = apply_overrides(RunConfig(), ["model.moe_router_topk=1", *ROUTERS[name]])
    config = apply_overrides(tuned(stored=stored), [override])
    assert any(said in error for error in finetune_errors(config))
    discrete = apply_overrides(tuned("discrete", stored), [override])
    assert list(finetune_errors(discrete)) == []  # has no router


@pytest.mark.parametrize(
    "settings",
    [
        {"quantizer": "cosine", "learn_code_scale": True},
        {"quantizer": "low_dim", "code_dim": 4, "train_projection": True},
    ],
    ids=["scale", "projection"],
)
def test_what_was_trained_of_a_codebook_is_held_still(settings: dict) -> None:
    stored = RunConfig(vq=VQConfig(**settings))
    kept = tuned("discrete", stored)
    assert layout_errors(kept, 1, "cpu") == [] and not kept.vq.trains_codebook
    assert kept.vq.learn_code_scale or kept.vq.train_projection  # the tensors are there
    gone = tuned("continuous", stored)
    assert not (gone.vq.learn_code_scale or gone.vq.train_projection)
    again = replace(stored, vq=replace(stored.vq, freeze_codebook=True))
    assert any("nothing of a frozen codebook" in e for e in layout_errors(again, 1, "cpu"))


def test_lfq_loses_its_entropy_loss_and_windows_are_as_long_as_texts() -> None:
    vq = VQConfig(
        quantizer="lfq", code_dim=4, num_codes=16, init="uniform",
        freeze_codebook=True, codebook_update="gradient",
    )  # fmt: skip
    stored = replace(RunConfig(vq=vq), data=DataConfig(eval_window_tokens=128))
    config = tuned(stored=stored)
    assert list(finetune_errors(config)) == []
    assert config.data.eval_window_tokens is None  # texts are shorter: 64 tokens
    counting = apply_overrides(config, ["vq.entropy_loss_coeff=0.1"])
    assert any("vq.entropy_loss_coeff=0: texts" in e for e in finetune_errors(counting))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("vq.freeze_codebook=false", "vq.freeze_codebook=true and vq.vq_loss_coeff=0: texts are"),
        ("vq.vq_loss_coeff=0.1", "vq.vq_loss_coeff=0"),
        ("model.moe_aux_loss_coeff=0.01", "moe_aux_loss_coeff=0"),
        ("train.task=pretrain", "train.task=pretrain with finetune.dataset=sst2"),
        ("train.engine=deepspeed", "use train.engine=megatron"),
        ("checkpoint.load=null", "starts from a checkpoint"),
        ("finetune.mode=discrete", "vq.path=discrete, not dual"),
        ("train.layout_independent_init=false", "all ranks draw the same head"),
        ("model.untie_embeddings_and_output_weights=false", "it has a head"),
    ],
)
def test_what_would_count_filling_is_refused(override: str, said: str) -> None:
    assert any(said in error for error in finetune_errors(apply_overrides(tuned(), [override])))


def test_memories_whose_codes_move_and_pipelines_of_a_head_alone_are_refused() -> None:
    moving = ["code_memory.num_rows=64", "code_memory.codes=hidden"]
    assert any("codes=tokens can" in e for e in finetune_errors(apply_overrides(tuned(), moving)))
    ids = apply_overrides(tuned(), ["code_memory.num_rows=64"])
    assert list(finetune_errors(ids)) == []
    pipeline = apply_overrides(tuned("head"), ["parallel.pipeline_model_parallel_size=2"])
    assert any("finetune.mode=head with pipeline" in e for e in finetune_errors(pipeline))
    threshold = RunConfig(vq=VQConfig(path="filled", threshold_routing=True))
    assert any("threshold" in error for error in finetune_errors(tuned(stored=threshold)))


def test_a_pretraining_recipe_has_nothing_to_do_with_it() -> None:
    assert list(finetune_errors(RunConfig())) == []
    alone = apply_overrides(RunConfig(), ["train.task=finetune"])
    assert any("belong together" in error for error in finetune_errors(alone))
    with pytest.raises(ValueError, match="choose one of full, continuous, discrete, head"):
        FinetuneConfig(mode="router")
