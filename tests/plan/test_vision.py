"""The plan of a model of images: the real model's parameters and operations, and its rules."""

from __future__ import annotations

import pytest
import torch
from images_run import VISION
from small_run import PARITY, layout_overrides

from vqmoe_megatron.config import VisionConfig
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.flops import run_flops
from vqmoe_megatron.plan.layout import check_layout, layout_errors
from vqmoe_megatron.plan.parameter_count import count_parameters
from vqmoe_megatron.plan.parameters import stage_parameters
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.plan.vision_rules import vision_errors

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
TP2 = [f"parallel.{TP}=2"]


def measured(overrides: list[str]) -> dict:
    """In a rank: names and shapes of the chunk's parameters, and operations of a microbatch."""
    from real_model import ATTENTION_FLOPS, _OneModule, _unwrapped
    from torch.utils.flop_counter import FlopCounterMode

    from vqmoe_megatron.engines.megatron.model import build_model, build_transformer_config

    config = load_recipe(PARITY, [*VISION, *overrides])
    layout = check_layout(config, torch.distributed.get_world_size(), "cpu")
    (wrapped,) = build_model(config, build_transformer_config(config, layout), layout)
    model = _unwrapped(wrapped)
    found = {"parameters": [(n, tuple(p.shape)) for n, p in model.named_parameters()]}
    if layout.pipeline_model_parallel_size > 1:
        return found
    wrapped.grad_accs = []  # its hooks add to fp32 buffers
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    model.double()
    images = torch.randn(config.train.micro_batch_size, 1, 8, 8, dtype=torch.float64)
    model(images)  # codes from the data
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS)
    counter.mod_tracker = _OneModule()
    with counter:
        loss = model(images).sum()
        found["forward"] = counter.get_total_flops()
        loss.backward()
        found["backward"] = counter.get_total_flops() - found["forward"]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, {TP: 2}, {PP: 2}], ids=["one", "tp2", "pp2"])
def test_parameters_are_those_of_the_real_model(ranks, layout: dict[str, int]) -> None:  # noqa: ANN001
    world = 2 if layout else 1
    overrides = layout_overrides(layout)
    config = load_recipe(PARITY, [*VISION, *overrides])
    checked = check_layout(config, world, "cpu")
    for rank, found in enumerate(ranks(world).run(measured, overrides, layout=layout)):
        (chunk,) = stage_parameters(config, checked, rank if PP in layout else 0)
        assert [(p.name, p.shape) for p in chunk] == found["parameters"]
    if not layout:
        count = count_parameters(config, checked)
        real = [torch.Size(shape).numel() for _, shape in found["parameters"]]
        assert count.total == sum(real)
        patches = {name: parts["patches"] for name, parts in (
            ("all", count.total_by_part), ("one", count.active_by_part)
        )}  # fmt: skip
        assert patches == {"all": (4 + 1 + 16) * 32, "one": (4 + 1 + 1) * 32}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [{}, {TP: 2}], ids=["one", "tp2"])
def test_operations_are_those_that_torch_counts(ranks, layout: dict[str, int]) -> None:  # noqa: ANN001
    """As tests/plan/test_flops_on_ranks.py has it: of the dense path, where rows cannot vary."""
    world = 2 if layout else 1
    overrides = [
        "vq.path=continuous", "model.num_moe_experts=1", "model.moe_router_topk=1",
        "model.moe_router_dtype=fp64", *layout_overrides(layout),
    ]  # fmt: skip
    config = load_recipe(PARITY, [*VISION, *overrides])
    planned = run_flops(config, check_layout(config, world, "cpu")).per_rank[0]
    number = check_layout(config, world, "cpu").num_microbatches(config.train)
    for found in ranks(world).run(measured, overrides, layout=layout):
        assert found["forward"] * number == planned.forward
        assert found["backward"] * number == planned.backward


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.seq_length=64", r"64 != \(8 / 2\)\^2 = 16; set model.seq_length=16"),
        ("model.position_embedding_type=rope", "have learned positions; use learned_absolute"),
        ("model.vocab_size=256", "an image has no token ids, the head has vision.num_classes"),
        ("code_memory.num_rows=64", "rows are found by token ids, and an image has no token ids"),
        ("model.untie_embeddings_and_output_weights=false", "patches and classes share no weights"),
        ("model.calculate_per_token_loss=true", "the loss counts images"),
        ("data.eval_stride_tokens=4", "every image is scored once"),
        ("data.eval_window_tokens=4", "an image is read whole"),
        ("data.cache_dir=/tmp/x", "the order of images follows from the seed"),
        ("checkpoint.remap=true", "it was never tried with a model of images"),
        ("train.engine=deepspeed", "train.engine=deepspeed with vision.image_size was never tried"),
        ("train.task=pretrain", "only train.task=images reads images"),
        ("vision.image_size=null", "train.task=images needs vision.image_size"),
    ],
)
def test_what_does_not_apply_to_images_is_refused(override: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_layout(load_recipe(PARITY, [*VISION, override]), 1, "cpu")


def test_a_router_by_token_ids_is_refused() -> None:
    config = load_recipe(PARITY, VISION)
    assert layout_errors(config, 1, "cpu") == []
    config.model.moe_router = "hash"
    assert any("routes by token ids, and an image has no" in e for e in vision_errors(config))


def test_cut_sequences_and_odd_layouts_are_refused() -> None:
    config = load_recipe(PARITY, [*VISION, "parallel.context_parallel_size=2"])
    assert any("attention to all patches is not cut" in e for e in layout_errors(config, 2, "cpu"))
    odd = ["vision.image_size=6", "model.seq_length=9", *TP2]
    (error,) = layout_errors(load_recipe(PARITY, [*VISION, *odd]), 2, "cpu")
    assert error.startswith("seq_length % TP != 0: 9 % 2 = 1")
    with pytest.raises(ValueError, match=r"vision\.image_size % vision\.patch_size != 0: 8 % 3"):
        VisionConfig(image_size=8, patch_size=3)


def test_tensor_ranks_send_less_at_both_ends_than_for_text() -> None:
    config = load_recipe(PARITY, [*VISION, *TP2])
    terms = plan_run(config, 2, "CPU").figures.wire.stages[0].terms
    ends = {(t.part, t.collective) for t in terms if t.part in ("embedding", "output")}
    assert ends == {("output", "all_reduce")}
