"""Kernels of fill: the operations of the plan, once, and nothing where nothing is filled."""

from __future__ import annotations

import pytest
from layer_shapes import changed, shape

from vqmoe_megatron.plan.fill_kernels import fill_kernels
from vqmoe_megatron.plan.flops import layer_flops
from vqmoe_megatron.plan.kernels import PARTS

LAYER = shape(
    execution="auto",
    path="filled",
    num_codes=5,
    num_local_tokens=100,
    hidden_size=6,
    moe_ffn_hidden_size=20,
    num_moe_experts=4,
)


@pytest.mark.parametrize("values", ["experts", "detached", "direct"])
def test_products_are_those_of_the_plan(values: str) -> None:
    layer = changed(LAYER, fill_values=values)
    fill = layer_flops(layer)["fill"]
    assert fill.forward == 2 * 32 * (100 // 32 + 5) * 4 * 6  # blocks of 32 tokens
    assert fill.backward == fill.forward * (1 if values == "detached" else 2)
    found = {"forward": 0, "backward": 0}
    for kernel in fill_kernels(layer, fill):
        found[kernel.phase] += kernel.operations
        assert kernel.part in PARTS
    assert found == {"forward": fill.forward, "backward": fill.backward}


def test_without_fill_there_is_the_threshold_alone() -> None:
    layer = changed(LAYER, threshold_routing=True, num_fill_experts=0)
    kernels = list(fill_kernels(layer, layer_flops(layer)["fill"]))
    assert [(kernel.name, kernel.operations) for kernel in kernels] == [("threshold", 0)]
