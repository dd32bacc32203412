"""Names, shapes and bytes of the real model on real ranks; what it keeps, to the byte."""

from __future__ import annotations

import pytest
from real_model import measure_state, recipe

from vqmoe_megatron.plan.gradient_buffers import stage_buffers
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.memory_cost import layer_parameters
from vqmoe_megatron.plan.model_parameters import padded_vocab_size, stage_parameters, unsharded
from vqmoe_megatron.plan.parameter_count import count_parameters
from vqmoe_megatron.plan.state_memory import state_bytes

DISTRIBUTED = "optimizer.use_distributed_optimizer=true"
TIED = "model.untie_embeddings_and_output_weights=false"
CASES = {
    "one rank": (1, {}, []),
    "bf16, rms, gated, gqa, low_dim, learned": (
        2,
        {},
        [
            DISTRIBUTED, "model.bf16=true", "model.normalization=RMSNorm",
            "model.add_bias_linear=false", "model.gated_linear_unit=true",
            "model.num_query_groups=2", "vq.quantizer=low_dim", "vq.code_dim=8",
            "vq.code_input=learned", "vq.codebook_update=gradient",
            "model.position_embedding_type=learned_absolute",
        ],
    ),
    "pp2, tied": (
        2, {"pipeline_model_parallel_size": 2}, [TIED, DISTRIBUTED, "model.bf16=true"]
    ),
    "pp2 vpp2, dense layers, product, discrete": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        [
            "model.moe_layer_freq=2", "vq.quantizer=product", "vq.num_code_slices=4",
            "vq.path=discrete", "vq.norm=shared", "optimizer.overlap_grad_reduce=true",
        ],
    ),
    "tp2 ep2, tied": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        [
            "vq.combine=sigmoid", "model.add_qkv_bias=true", "model.add_bias_linear=false", TIED,
            "model.bf16=true",
        ],
    ),
    "tp2 etp2, continuous, gated": (
        2,
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        ["vq.path=continuous", "model.gated_linear_unit=true", DISTRIBUTED],
    ),
    "etp2, reanchor, odd widths": (
        2,
        {"expert_tensor_parallel_size": 2},
        [
            "vq.codebook_update=reanchor", "vq.code_input=learned", "model.kv_channels=16",
            "model.moe_layer_freq=3", "model.ffn_hidden_size=80", DISTRIBUTED,
        ],
    ),
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_parameters_and_state_are_those_of_the_model(ranks, name: str) -> None:
    world_size, sizes, overrides = CASES[name]
    overrides = overrides + [f"parallel.{axis}={size}" for axis, size in sizes.items()]
    measured = ranks(world_size).run(measure_state, overrides, layout=sizes)
    config = recipe(overrides)
    layout = check_layout(config, world_size, "cpu")
    counted = count_parameters(config, layout)
    for rank in measured:
        stage = rank["pipeline"]
        planned = [
            [(p.name, p.shape, p.bytes_per_element) for p in chunk]
            for chunk in stage_parameters(config, layout, stage)
        ]
        assert planned == rank["parameters"]
        elements = sum(_product(shape) for chunk in rank["parameters"] for _, shape, _ in chunk)
        assert counted.per_rank[stage] == elements
        buffers = stage_buffers(config, layout, stage)
        assert [buffer.num_elements for buffer in buffers] == rank["buffer_elements"]
        kept = state_bytes(config, layout, stage, rank["data"], rank["expert_data"])
        for part in ("weights", "gradients", "main_parameters", "moments", "statistics"):
            assert (part, getattr(kept, part)) == (part, rank[part])


@pytest.mark.parametrize("name", CASES)
def test_the_whole_model_does_not_depend_on_the_layout(name: str) -> None:
    world_size, sizes, overrides = CASES[name]
    whole = recipe(overrides)
    cut = recipe(overrides + [f"parallel.{axis}={size}" for axis, size in sizes.items()])
    layout = check_layout(cut, world_size, "cpu")
    assert count_parameters(cut, layout).total == count_parameters(whole, unsharded()).total


@pytest.mark.parametrize("path", ["dual", "discrete", "continuous"])
def test_moe_parts_are_those_of_the_layer_model(path: str) -> None:
    config = recipe([f"vq.path={path}", "model.moe_layer_freq=2"])
    counted = count_parameters(config, unsharded())
    layer = layer_parameters(LayerShape.from_config(config, unsharded()))
    total, active = counted.total_by_part, counted.active_by_part
    assert total["experts"] == 2 * layer.experts  # layers 0 and 2 of 4
    assert active["experts"] == 2 * layer.active_experts
    assert total.get("codebooks", 0) == 2 * layer.codebook
    assert total.get("router", 0) == 2 * layer.router
    assert total.get("gates", 0) == 2 * layer.gate


def test_a_token_uses_one_row_of_an_untied_embedding() -> None:
    untied = count_parameters(recipe([]), unsharded())
    assert untied.active_by_part["embeddings"] == 48
    tied = count_parameters(recipe([TIED]), unsharded())
    assert tied.active_by_part["embeddings"] == tied.total_by_part["embeddings"] == 384 * 48
    assert "output_layer" not in tied.total_by_part


def test_without_a_vocabulary_nothing_is_counted() -> None:
    config = recipe(["model.vocab_size=null"])
    with pytest.raises(ValueError, match="model.vocab_size is not set"):
        padded_vocab_size(config.model)


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
