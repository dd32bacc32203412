"""The formulas against the layer itself: torch counts its matrix products, in both passes.

In fp64, where every expert's product is a plain one that the counter knows.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tiny_layer import FFN, HIDDEN, NUM_EXPERTS, SHARED_FFN, build_layer, draw_parameters
from torch.utils.flop_counter import FlopCounterMode

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.plan.flops import Flops, layer_flops
from vqmoe_megatron.plan.shape import LayerShape

pytestmark = pytest.mark.distributed

TOPK = 2
BASE = {"init": "uniform", "num_codes": 10, "dead_code_threshold": 0.0}  # N does not divide K
LOW_DIM = {"quantizer": "low_dim", "code_dim": 3}
RESIDUAL = {"quantizer": "residual", "num_code_slices": 3}
FSQ = {
    "quantizer": "fsq",
    "code_dim": 2,
    "fsq_levels": [5, 2],
    "freeze_codebook": True,
    "codebook_update": "gradient",
}
KINDS = (
    {},
    {"num_code_slices": 4, "quantizer": "product"},
    {"code_input": "learned"},
    LOW_DIM,
    {"code_input": "learned", **LOW_DIM},
    {"execution": "code_space", "table_per_step": True},
    {"execution": "code_space", "table_per_step": True, **LOW_DIM},
)
CASES = (
    [
        {"path": "continuous"},
        {"expert_input": "blend"},
        {"path": "continuous", **LOW_DIM},
        {"expert_input": "blend", **LOW_DIM},
        {"expert_input": "token", **LOW_DIM},
        {"path": "filled"},
        {"path": "filled", "num_fill_experts": 3, **LOW_DIM},
        {"path": "filled", "table_per_step": True, **LOW_DIM},
        {"path": "filled", "fill_values": "detached", **LOW_DIM},
        {"path": "filled", "fill_values": "direct", "table_per_step": True},
        {"path": "filled", **FSQ},
        {"expert_input": "blend", **RESIDUAL},
        {"expert_input": "token", **FSQ, "train_projection": True},
    ]
    + [
        {"path": path, "execution": execution, "straight_through": mode, **kind}
        for (path, execution), mode, kind in product(
            (("dual", "tokens"), ("dual", "code_space"), ("discrete", "code_space")),
            ("identity", "token", "group"),
            (
                RESIDUAL,
                FSQ,
                {**FSQ, "train_projection": True},
                {**LOW_DIM, "train_projection": True},
            ),
        )
    ]
    + [
        {"path": path, "execution": execution, "norm": norm, "straight_through": mode, **kind}
        for path, execution, norm, mode, kind in product(
            ("dual", "discrete"),
            ("tokens", "code_space"),
            ("none", "separate"),
            ("none", "identity", "token", "group"),
            KINDS,
        )
        if execution == kind.get("execution", execution)
    ]
)

# Beside the settings: the number of experts and of selected ones, and whether one is shared.
CONTROLS = [
    ({"path": path, "execution": execution, "norm": norm}, num_experts, is_shared)
    for (path, execution), norm, (num_experts, is_shared) in product(
        (("dual", "tokens"), ("dual", "code_space"), ("continuous", "tokens")),
        ("none", "separate"),
        ((1, False), (1, True), (NUM_EXPERTS, True)),
    )
]


class OneModule:
    """Everything belongs to the whole model: following modules would put hooks on autograd, which
    forbids the gradients that the layer takes inside its backward pass."""

    parents = {"Global"}

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def count_all(cases: list[dict], gated: bool) -> list[list[int]]:
    """In a rank: (forward, backward) operations of every case."""
    return [count(VQConfig(**case), gated) for case in cases]


def count_controls(cases: list[tuple[dict, int, bool]], gated: bool) -> list[list[int]]:
    """In a rank: as :func:`count_all`, of layers without biases."""
    return [
        count(VQConfig(**case), gated, num_experts, is_shared)
        for case, num_experts, is_shared in cases
    ]


def count(
    vq: VQConfig, gated: bool, num_experts: int = NUM_EXPERTS, is_shared: bool = False
) -> list[int]:
    parameters = draw_parameters(
        vq, gated=gated, num_experts=num_experts, shared=is_shared, bias=not is_shared
    )
    layer = build_layer(
        vq,
        parameters,
        num_moe_experts=num_experts,
        moe_router_topk=min(TOPK, num_experts),
        gated_linear_unit=gated,
        add_bias_linear=not is_shared,
        moe_shared_expert_intermediate_size=SHARED_FFN if is_shared else None,
    )
    x = torch.randn(5, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = OneModule()
    with counter:
        output, _ = layer(x)
        forward = counter.get_total_flops()
        output.square().sum().backward()
        layer.finish_table()
    return [forward, counter.get_total_flops() - forward]


@pytest.mark.parametrize("gated", [False, True])
def test_every_product_of_the_layer_is_predicted(ranks, gated: bool) -> None:  # noqa: ANN001
    cases = [{**BASE, **case} for case in CASES]
    (found,) = ranks(1).run(count_all, cases, gated)
    for case, (forward, backward) in zip(cases, found, strict=True):
        vq = VQConfig(**case)
        cost = layer_flops(
            LayerShape(
                vq=vq,
                num_local_tokens=10,
                hidden_size=HIDDEN,
                moe_ffn_hidden_size=FFN,
                num_moe_experts=NUM_EXPERTS,
                moe_router_topk=TOPK,
                gated_linear_unit=gated,
                bytes_per_element=8,
            )
        )
        assert sum(cost.values(), Flops()) == Flops(forward, backward), case


@pytest.mark.parametrize("gated", [False, True])
def test_every_product_of_the_control_arms_is_predicted(ranks, gated: bool) -> None:  # noqa: ANN001
    cases = [({**BASE, **case}, *sizes) for case, *sizes in CONTROLS]
    (found,) = ranks(1).run(count_controls, cases, gated)
    for (case, num_experts, is_shared), (forward, backward) in zip(cases, found, strict=True):
        cost = layer_flops(
            LayerShape(
                vq=VQConfig(**case),
                num_local_tokens=10,
                hidden_size=HIDDEN,
                moe_ffn_hidden_size=FFN,
                num_moe_experts=num_experts,
                moe_router_topk=min(TOPK, num_experts),
                gated_linear_unit=gated,
                bytes_per_element=8,
                moe_shared_expert_intermediate_size=SHARED_FFN if is_shared else None,
            )
        )
        found_here = Flops(forward, backward)
        assert sum(cost.values(), Flops()) == found_here, (case, num_experts, is_shared)
