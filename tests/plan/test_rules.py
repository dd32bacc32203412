"""Rules between recipe sections that no single section can check."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_recipe, save_recipe
from vqmoe_megatron.plan.layout import layout_errors


@pytest.mark.parametrize(
    ("broken", "mended", "named"),
    [
        (
            ["train.nan_policy=rollback"],
            ["checkpoint.save_interval=5"],
            "checkpoint.save_interval=0 writes none on the way",
        ),
        (["checkpoint.remap=true"], ["checkpoint.load=runs/old"], "needs checkpoint.load"),
        (
            ["model.bf16=true", "vq.codebook_update=gradient"],
            ["optimizer.use_distributed_optimizer=true"],
            "vq.codebook_update=gradient needs optimizer.use_distributed_optimizer=true",
        ),
        (
            [
                "model.bf16=true",
                "vq.path=continuous",
                "vq.codebook_update=gradient",
                "code_memory.num_rows=64",
                "code_memory.codes=hidden",
            ],
            ["optimizer.use_distributed_optimizer=true"],
            "vq.codebook_update=gradient needs optimizer.use_distributed_optimizer=true",
        ),
        (
            [
                "model.bf16=true",
                "vq.codebook_update=gradient",
                "vq.freeze_codebook=true",  # of the layer; the memory has a codebook of its own
                "code_memory.num_rows=64",
                "code_memory.codes=hidden",
            ],
            ["optimizer.use_distributed_optimizer=true"],
            "vq.codebook_update=gradient needs optimizer.use_distributed_optimizer=true",
        ),
        (
            [
                "model.recompute_granularity=selective",
                "model.recompute_modules=[mlp]",
                "model.moe_layer_freq=2",
            ],
            ["model.add_bias_linear=false"],
            "recompute_modules mlp with dense layers (moe_layer_freq = 2 > 1) that have biases",
        ),
        (
            [
                "model.moe_z_loss_coeff=0.001",
                "model.calculate_per_token_loss=true",
                "parallel.tensor_model_parallel_size=2",
            ],
            ["model.calculate_per_token_loss=false"],
            "moe_z_loss_coeff=0.001 with calculate_per_token_loss and TP * CP = 2",
        ),
        (["model.fp8=hybrid"], ["vq.execution=tokens"], "wired to token dispatch only"),
        (
            [
                "model.fp8=hybrid",
                "vq.path=continuous",
                "code_memory.num_rows=64",
                "code_memory.values=experts",
            ],
            ["code_memory.values=direct"],
            "use code_memory.values=direct, or leave fp8 out",
        ),
        (["model.fp8=hybrid", "vq.path=filled"], ["vq.path=continuous"], "or leave fp8 out"),
        (
            ["vq.path=filled", "model.moe_router_topk=2", "model.moe_router_pre_softmax=false"],
            ["model.moe_router_pre_softmax=true"],
            "every expert is weighed by the softmax over all of them",
        ),
        (
            ["vq.path=filled", "vq.threshold_routing=true", "model.moe_router_topk=2"],
            ["model.moe_router_topk=1"],
            "one exact expert per token on average",
        ),
        (
            ["model.fp8=hybrid", "vq.execution=tokens", "parallel.expert_tensor_parallel_size=2"],
            ["model.add_bias_linear=false"],
            "model.fp8=hybrid with add_bias_linear and ETP = 2 > 1",
        ),
        (
            ["model.fp8=e4m3", "vq.execution=tokens", "model.moe_ffn_hidden_size=80"],
            ["model.moe_ffn_hidden_size=96"],
            "moe_ffn_hidden_size % (ETP * 32 = 1 * 32) != 0: 80",
        ),
        (
            [
                "model.fp8=e4m3",
                "vq.execution=tokens",
                "model.add_bias_linear=false",
                "model.moe_shared_expert_intermediate_size=80",
            ],
            ["model.moe_shared_expert_intermediate_size=96"],
            "moe_shared_expert_intermediate_size % (TP * 32 = 1 * 32) != 0: 80",
        ),
        (
            [
                "model.fp8=e4m3",
                "vq.execution=tokens",
                "model.recompute_granularity=selective",
                "model.recompute_modules=[moe]",
            ],
            ["model.recompute_modules=[core_attn]"],
            "leave moe out of recompute_modules",
        ),
    ],
)
def test_a_combination_is_refused_until_it_is_mended(tmp_path, broken, mended, named):
    recipe = tmp_path / "recipe.yaml"
    save_recipe(RunConfig(), recipe)
    (error,) = layout_errors(load_recipe(recipe, broken), 2, "cpu")
    assert named in error
    assert layout_errors(load_recipe(recipe, [*broken, *mended]), 2, "cpu") == []
