"""The layer's check: equal on the CPU, and a wrong layer is seen."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from fast_tier import tiered

from vqmoe_megatron.bench.gate import TOLERANCE
from vqmoe_megatron.gpu_proof.layer_check import TINY_VARIANTS, VARIANTS

pytestmark = pytest.mark.distributed

CASES = [
    (name, execution, dtype)
    for name, variant in VARIANTS.items()
    for execution, dtype in product(variant.executions, TOLERANCE)
]


def differences(name: str, execution: str, dtype: str, is_tiny: bool) -> dict[str, float]:
    """In a rank."""
    from vqmoe_megatron.gpu_proof.layer_check import layer_differences

    return layer_differences(VARIANTS[name], execution, dtype, is_tiny)


@pytest.mark.parametrize(
    ("name", "execution", "dtype"),
    tiered(
        CASES, [case for case in CASES if case[0] in TINY_VARIANTS], ["-".join(c) for c in CASES]
    ),
)
def test_every_variant_equals_the_oracle_at_the_size_of_the_proof(
    name: str, execution: str, dtype: str, ranks
) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(differences, name, execution, dtype, False)
    assert {"output", "gradient of x", "experts.weight1"} <= set(found)
    assert {tensor: d for tensor, d in found.items() if not d <= TOLERANCE[dtype]} == {}


def differences_of_a_wrong_layer() -> dict[str, float]:
    """In a rank: the oracle is handed another expert weight than the layer has."""
    from vqmoe_megatron.gpu_proof import layer_check

    case = layer_check.LayerCase(8, 24, 12, 32, 48, norm="separate")
    vq = layer_check.VQConfig(num_codes=24, init="uniform", codebook_update="gradient")
    layer = layer_check.VQMoELayer(
        layer_check.transformer_config(case, 1), layer_check.own_submodules(), 1, vq=vq
    )
    generator = torch.Generator().manual_seed(1)
    layer_check._draw_parameters(layer, generator)
    x = layer_check._clear_tokens(layer, case, 1, generator)
    found = layer_check._of_layer(layer, x, torch.ones_like(x))
    with torch.no_grad():
        layer.experts.weight2 *= 1.01
    expected = layer_check._of_oracle(layer, x, torch.ones_like(x), case, layer_check.Variant())
    return {
        name: layer_check.relative_difference(found[name].double(), expected[name])
        for name in found
    }


def test_one_percent_in_one_weight_is_seen(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(differences_of_a_wrong_layer)
    assert found["output"] > TOLERANCE["float32"]
