"""Names, shapes and bytes of the real model on real ranks; what it keeps, to the byte."""

from __future__ import annotations

import pytest
from real_model import measure_state, recipe
from tiny_layer import FFN, HIDDEN, NUM_EXPERTS, draw_parameters

from vqmoe_megatron.config import ModelConfig, RunConfig, VQConfig
from vqmoe_megatron.plan.layout import check_layout, unsharded
from vqmoe_megatron.plan.parameter_count import count_parameters
from vqmoe_megatron.plan.parameters import padded_vocab_size, stage_parameters
from vqmoe_megatron.plan.state_memory import stage_buffers, state_bytes

DISTRIBUTED = "optimizer.use_distributed_optimizer=true"
TIED = "model.untie_embeddings_and_output_weights=false"
ONE_EXPERT = ["model.num_moe_experts=1", "model.moe_router_topk=1"]
RELEASED = [
    "model.norm_placement=post", "vq.norm=shared_with_block", "vq.expert_input=blend",
    "model.moe_router_freeze=true", "model.moe_router_pre_softmax=false", "model.moe_router_topk=1",
]  # fmt: skip
FSQ = [
    "vq.quantizer=fsq", "vq.code_dim=3", "vq.fsq_levels=[3, 2, 4]", "vq.num_codes=24",
    "vq.freeze_codebook=true", "vq.codebook_update=gradient", "vq.init=uniform",
]  # fmt: skip
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
    "filled, threshold": (
        1,
        {},
        ["vq.path=filled", "vq.threshold_routing=true", "model.moe_router_topk=1", DISTRIBUTED],
    ),
    "ep2, filled, learned rows": (
        2,
        {"expert_model_parallel_size": 2},
        ["vq.path=filled", "vq.fill_values=direct", "model.bf16=true", DISTRIBUTED],
    ),
    "etp2, filled, learned rows": (
        2,
        {"expert_tensor_parallel_size": 2},
        ["vq.path=filled", "vq.fill_values=direct", "vq.table_per_step=true"],
    ),
    "tp2 etp2, continuous, gated": (
        2,
        {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
        ["vq.path=continuous", "model.gated_linear_unit=true", DISTRIBUTED],
    ),
    "tp2 ep2, shared expert, gated": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        [
            "model.moe_shared_expert_intermediate_size=40", "model.gated_linear_unit=true",
            "model.add_bias_linear=false", "vq.code_input=learned", DISTRIBUTED,
        ],
    ),
    "pp2, shared expert, bf16": (
        2,
        {"pipeline_model_parallel_size": 2},
        [
            "model.moe_shared_expert_intermediate_size=24", "model.add_bias_linear=false",
            "model.moe_layer_freq=2", "model.bf16=true", DISTRIBUTED,
        ],
    ),
    "tp2 ep2, as released": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        [
            *RELEASED, "model.moe_layer_freq=2", "vq.codebook_update=gradient",
            "model.position_embedding_type=learned_absolute", TIED,
        ],
    ),
    "residual, bf16": (
        2,
        {},
        [
            "vq.quantizer=residual", "vq.num_code_slices=3", "vq.codebook_update=gradient",
            "model.bf16=true", DISTRIBUTED,
        ],
    ),
    "tp2 ep2, trained projection, bf16": (
        2,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        [*FSQ, "vq.train_projection=true", "model.bf16=true", DISTRIBUTED],
    ),
    "scale of cosine codes": (
        1, {}, ["vq.quantizer=cosine", "vq.learn_code_scale=true", DISTRIBUTED],
    ),
    "lfq": (
        1,
        {},
        [
            "vq.quantizer=lfq", "vq.code_dim=4", "vq.num_codes=16", "vq.init=uniform",
            "vq.freeze_codebook=true", "vq.codebook_update=gradient",
        ],
    ),
    "one expert": (1, {}, ["vq.path=continuous", *ONE_EXPERT]),
    "etp2, one expert, dual": (
        2,
        {"expert_tensor_parallel_size": 2},
        [*ONE_EXPERT, DISTRIBUTED],
    ),
    "etp2, reanchor, odd widths": (
        2,
        {"expert_tensor_parallel_size": 2},
        [
            "vq.codebook_update=reanchor", "vq.code_input=learned", "model.kv_channels=16",
            "model.moe_layer_freq=3", "model.ffn_hidden_size=80", DISTRIBUTED,
            "vq.freeze_after_steps=5",
        ],
    ),
    "pp2 tp2 ep2, memory on codes and contexts, gate, bf16": (
        4,
        {
            "pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
        },
        [
            "code_memory.num_rows=64", "code_memory.num_codes=40", "code_memory.gate=token",
            "code_memory.num_context_codes=10", "code_memory.context_dim=6", DISTRIBUTED,
            "code_memory.codes=embedding", "model.bf16=true", "vq.path=continuous",
            "code_memory.layers=[2, 3]",
        ],
    ),
    "etp2, memory on hidden states": (
        2,
        {"expert_tensor_parallel_size": 2},
        [
            "code_memory.num_rows=64", "code_memory.num_codes=20", "code_memory.codes=hidden",
            "code_memory.max_order=2", "vq.codebook_update=gradient",
        ],
    ),
    "memory on hidden states beside fsq": (  # the layer's codes stay, the memory's are trained
        1,
        {},
        [
            "code_memory.num_rows=64", "code_memory.num_codes=20", "code_memory.codes=hidden",
            *FSQ, "model.bf16=true", DISTRIBUTED,
        ],
    ),
    "memory on hidden states that are fixed": (
        1,
        {},
        [
            "code_memory.num_rows=64", "code_memory.num_codes=20", "code_memory.codes=hidden",
            "code_memory.freeze_after_steps=0", "vq.codebook_update=gradient",
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


def drawn_and_planned(vq: VQConfig, **model) -> tuple[dict[str, int], dict[str, int]]:
    """Elements of a layer's tensors by name: those of a drawn layer, and as the plan lists them."""
    drawn = draw_parameters(
        vq,
        gated=model.get("gated_linear_unit", False),
        bias=model.get("add_bias_linear", True),
        normalization=model.get("normalization", "LayerNorm"),
    )
    config = RunConfig(
        model=ModelConfig(
            num_layers=1, hidden_size=HIDDEN, moe_ffn_hidden_size=FFN, num_attention_heads=2,
            num_moe_experts=NUM_EXPERTS, vocab_size=128, **model,
        ),
        vq=vq,
    )  # fmt: skip
    (chunk,) = stage_parameters(config, unsharded(), 0)
    prefix = "decoder.layers.0.mlp."
    planned = {p.name.removeprefix(prefix): p.num_elements for p in chunk if prefix in p.name}
    return {name: tensor.numel() for name, tensor in drawn.items()}, planned


@pytest.mark.parametrize("path", ["dual", "discrete", "continuous"])
@pytest.mark.parametrize("norm", ["none", "shared", "separate"])
@pytest.mark.parametrize(
    ("gated", "bias", "normalization", "combine", "slices"),
    [(False, True, "LayerNorm", "softmax", 1), (True, False, "RMSNorm", "sigmoid", 4)],
)
def test_moe_parameters_are_those_of_a_layer(
    path: str, norm: str, gated: bool, bias: bool, normalization: str, combine: str, slices: int
) -> None:
    vq = VQConfig(
        num_codes=10, num_code_slices=slices, quantizer="product", path=path, norm=norm,
        combine=combine,
    )  # fmt: skip
    drawn, planned = drawn_and_planned(
        vq, gated_linear_unit=gated, add_bias_linear=bias, normalization=normalization
    )
    assert planned == drawn


@pytest.mark.parametrize("code_input", ["codebook", "learned"])
def test_low_dim_codes_are_narrow_and_its_projection_is_no_parameter(code_input: str) -> None:
    vq = VQConfig(num_codes=10, quantizer="low_dim", code_dim=3, code_input=code_input)
    drawn, planned = drawn_and_planned(vq)
    del drawn["assigner.codebook.projection"]
    assert planned == drawn
    assert planned["assigner.codebook.codes"] == 10 * 3


SMALL_LAYER = [  # alone in its model
    *("model.num_layers=1", "model.hidden_size=6", "model.num_attention_heads=1"),
    *("model.moe_ffn_hidden_size=20", "model.num_moe_experts=4", "vq.num_codes=3"),
    *("model.activation_func=gelu", "model.moe_router_topk=2"),
]


def of_layer(*overrides: str) -> tuple[dict[str, int], dict[str, int]]:
    """Elements of a small model by part: all, and those of one token."""
    counted = count_parameters(recipe([*SMALL_LAYER, *overrides]), unsharded())
    return counted.total_by_part, counted.active_by_part


def test_a_token_uses_the_experts_of_its_rows() -> None:
    # an expert: 6 * 20 + 20 + 20 * 6 + 6 = 266; router 4 * 7; gate 2 * 7; codes 3 * 6
    total, active = of_layer()
    assert (total["experts"], active["experts"]) == (4 * 266, (2 + 1) * 266)
    rest = {"router": 28, "gates": 14, "codebooks": 18}
    assert {part: total[part] for part in rest} == {part: active[part] for part in rest} == rest
    total, active = of_layer("vq.path=continuous")
    assert (active["experts"], active["router"]) == (2 * 266, 28)
    assert not {"gates", "codebooks"} & set(total)
    product = ["vq.quantizer=product", "vq.num_code_slices=3"]
    total, active = of_layer(*product)  # 2 + 3 rows, more than experts
    assert active["experts"] == total["experts"] == 4 * 266
    total, active = of_layer(*product, "vq.path=discrete")
    assert active["experts"] == 3 * 266
    assert of_layer("vq.path=filled")[1]["experts"] == 4 * 266  # all answer
    assert of_layer("vq.path=filled", "vq.num_fill_experts=3")[1]["experts"] == 3 * 266
    learned = ["vq.path=filled", "vq.fill_values=direct", "vq.num_fill_experts=3"]
    total, active = of_layer(*learned)
    assert (total["fill_rows"], active["fill_rows"]) == (4 * 3 * 6, 3 * 6)
    assert active["experts"] == 2 * 266
    layers_0_and_2 = count_parameters(recipe(["model.moe_layer_freq=2"]), unsharded())
    every_layer = count_parameters(recipe([]), unsharded())
    for part in ("total_by_part", "active_by_part"):
        half, whole = getattr(layers_0_and_2, part), getattr(every_layer, part)
        assert 2 * half["experts"] == whole["experts"]


def test_a_shared_expert_is_used_whole_and_one_expert_has_no_router() -> None:
    no_bias = "model.add_bias_linear=false"
    total, active = of_layer("model.moe_shared_expert_intermediate_size=10", no_bias)
    assert total["shared_experts"] == active["shared_experts"] == 10 * 6 + 6 * 10
    gated = [no_bias, "model.gated_linear_unit=true"]
    total, _ = of_layer("model.moe_shared_expert_intermediate_size=10", *gated)
    assert total["shared_experts"] == 2 * 10 * 6 + 6 * 10
    total, active = of_layer(*ONE_EXPERT, "vq.path=continuous")
    assert total["experts"] == active["experts"] == 266
    assert "router" not in total
    assert "router" not in of_layer(*ONE_EXPERT)[0]  # with the discrete path beside it


def test_learned_inputs_are_full_width_and_read_per_code() -> None:
    slices = ["vq.quantizer=product", "vq.num_code_slices=3", "vq.path=discrete", "vq.num_codes=5"]
    total, active = of_layer(*slices, "vq.code_input=learned")
    assert (total["learned_inputs"], active["learned_inputs"]) == (3 * 5 * 6, 3 * 6)
    plain, plain_active = of_layer(*slices)
    assert {**plain, "learned_inputs": 90} == total
    assert {**plain_active, "learned_inputs": 18} == active


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
