"""What DeepSpeed cannot do here is refused by name, before anything starts."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.layout import layout_errors

PARITY = "recipes/parity.yaml"
DEEPSPEED = ["train.engine=deepspeed", "model.vocab_size=256"]
ZERO1 = [*DEEPSPEED, "train.zero_stage=1"]
REFUSED = {
    "tensor-parallel": (2, ["parallel.tensor_model_parallel_size=2"], "TP * PP * CP * ETP = 1"),
    "pipeline": (2, ["parallel.pipeline_model_parallel_size=2"], "1 * 2 * 1 * 1"),
    "expert-tensor": (2, ["parallel.expert_tensor_parallel_size=2"], "1 * 1 * 1 * 2"),
    "distributed-optimizer": (2, ["optimizer.use_distributed_optimizer=true"], "cuts the optim"),
    "kept-table": (1, ["vq.table_per_step=true"], "vq.table_per_step"),
    "per-token-loss": (1, ["model.calculate_per_token_loss=true"], "calculate_per_token_loss"),
    "graphs": (1, ["train.cuda_graphs=true"], "train.cuda_graphs"),
    "fused-adam": (1, ["optimizer.fused_adam=true"], "optimizer.fused_adam=true"),
    "trained-codes-bf16": (1, ["model.bf16=true", "vq.codebook_update=gradient"], "stay fp32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_do_is_refused_with_the_reason(name):
    world_size, overrides, reason = REFUSED[name]
    errors = layout_errors(load_recipe(PARITY, [*ZERO1, *overrides]), world_size)
    assert [error for error in errors if reason in error], errors


def test_zero_0_keeps_to_fp32_and_to_the_device():
    whole = [*DEEPSPEED, "train.zero_stage=0"]
    for override, reason in (
        ("model.bf16=true", "train.zero_stage=1"),
        ("train.offload_optimizer=true", "ZeRO 0 offloads nothing"),
    ):
        (error,) = layout_errors(load_recipe(PARITY, [*whole, override]), 1)
        assert reason in error
    assert layout_errors(load_recipe(PARITY, whole), 2) == []


def test_its_keys_mean_nothing_to_megatrons_engine():
    for override in ("train.zero_stage=1", "train.offload_optimizer=true"):
        (error,) = layout_errors(load_recipe(PARITY, ["model.vocab_size=256", override]), 1)
        assert override.partition("=")[0] in error and "train.engine=deepspeed" in error


def test_zero_3_is_no_stage():
    with pytest.raises(ValueError, match="train.zero_stage=3 must be .*at most 2"):
        load_recipe(PARITY, [*DEEPSPEED, "train.zero_stage=3"])


@pytest.mark.parametrize(("world_size", "expert_size"), [(1, 1), (2, 2), (4, 2), (8, 8)])
def test_data_and_expert_parallel_layouts_may_run(world_size, expert_size):
    layout = f"parallel.expert_model_parallel_size={expert_size}"
    assert layout_errors(load_recipe(PARITY, [*ZERO1, layout]), world_size) == []


FSQ = ["vq.quantizer=fsq", "vq.code_dim=2", "vq.fsq_levels=[4, 4]", "vq.num_codes=16"]
FSQ += ["vq.freeze_codebook=true", "vq.codebook_update=gradient", "vq.init=uniform"]
HIDDEN = ["code_memory.num_rows=64", "code_memory.codes=hidden"]


@pytest.mark.parametrize(
    ("overrides", "is_refused"),
    [
        (["vq.path=continuous", "vq.codebook_update=gradient"], False),  # no codebook is there
        (FSQ, False),  # codes that follow from their numbers, which nothing trains
        ([*FSQ, "vq.train_projection=true"], True),
        ([*FSQ, *HIDDEN], True),  # the memory's own codes follow their gradient
    ],
    ids=["no-codes", "frozen-codes", "projection", "codes-of-a-memory"],
)
def test_bf16_is_refused_for_what_an_optimizer_moves_of_codebooks(overrides, is_refused):
    errors = layout_errors(load_recipe(PARITY, [*ZERO1, "model.bf16=true", *overrides]), 1)
    assert len(errors) == is_refused and all("stay fp32" in error for error in errors)
