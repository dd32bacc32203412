"""Estimated activations against the tensors that a real model's forward pass saves."""

from __future__ import annotations

import pytest
from real_model import measure_activations, recipe

from vqmoe_megatron.plan.activation_memory import activation_bytes, chunk_activation_bytes
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.model_parameters import chunk_places

LARGEST_ERROR = 0.03
SIZES = [
    "model.seq_length=64", "train.micro_batch_size=2", "model.hidden_size=64",
    "model.moe_ffn_hidden_size=128",
]  # fmt: skip
FULL = ["model.recompute_granularity=full", "model.recompute_num_layers=2"]
CASES = {
    "dual": (1, {}, []),
    "continuous": (1, {}, ["vq.path=continuous"]),
    "discrete": (1, {}, ["vq.path=discrete"]),
    "tokens": (1, {}, ["vq.execution=tokens"]),
    "blend": (1, {}, ["vq.expert_input=blend", "vq.path=discrete"]),
    "product": (1, {}, ["vq.quantizer=product", "vq.num_code_slices=4"]),
    "bf16 rms gated": (
        1,
        {},
        ["model.bf16=true", "model.normalization=RMSNorm", "model.gated_linear_unit=true"],
    ),
    "dense layers, groups": (1, {}, ["model.num_query_groups=2", "model.moe_layer_freq=2"]),
    "dropout": (1, {}, ["model.hidden_dropout=0.1", "model.attention_dropout=0.1"]),
    "uniform": (1, {}, [*FULL, "model.recompute_method=uniform"]),
    "block": (1, {}, [*FULL, "model.recompute_method=block"]),
    "selective": (1, {}, ["model.recompute_granularity=selective"]),
    "tp2 ep2": (2, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, []),
    "etp2": (2, {"expert_tensor_parallel_size": 2}, ["model.gated_linear_unit=true"]),
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_estimate_is_near_what_is_saved(ranks, name: str) -> None:
    world_size, sizes, overrides = CASES[name]
    overrides = SIZES + overrides + [f"parallel.{axis}={size}" for axis, size in sizes.items()]
    measured = ranks(world_size).run(measure_activations, overrides, layout=sizes)
    config = recipe(overrides)
    layout = check_layout(config, world_size, "cpu")
    (place,) = chunk_places(config.model, layout, 0)
    planned = chunk_activation_bytes(config, place, activation_bytes(config, layout, "local"))
    mean = sum(measured) / len(measured)  # experts are not equally loaded
    assert abs(planned / mean - 1) < LARGEST_ERROR, (planned, measured)


def test_fused_kernels_keep_no_scores() -> None:
    config = recipe(SIZES)
    layout = check_layout(config, 1, "cpu")
    local, fused = (activation_bytes(config, layout, kernels) for kernels in ("local", "fused"))
    assert fused.core_scores == 2 * 4 * 64 * 4  # b A S, fp32
    assert local.core_scores == 2 * 4 * 64 * 64 * 4 + 64 * 64
    assert local.attention - fused.attention == local.core_scores - fused.core_scores
    with pytest.raises(ValueError, match="kernels='flash': choose one of local, fused"):
        activation_bytes(config, layout, "flash")
