"""The weights of the two paths, and their sum."""

from __future__ import annotations

import pytest
import torch
from tiny_layer import HIDDEN, transformer_config

from vqmoe_megatron.config import VQConfig

pytestmark = pytest.mark.distributed


def gate_weights(combine: str, bias: float) -> dict:
    from vqmoe_megatron.moe.combine_gate import CombineGate, weighted_sum
    from vqmoe_megatron.moe.part import DensePart

    gate = CombineGate(transformer_config(), VQConfig(combine=combine, combine_bias=bias))
    torch.nn.init.zeros_(gate.linear.weight)  # the start, whatever the token
    y_continuous, y_discrete = torch.full((3, HIDDEN), 2.0), torch.full((3, HIDDEN), 5.0)
    weights = gate(torch.randn(3, HIDDEN))
    parts = [DensePart(y_continuous), DensePart(y_discrete)]
    return {
        "weights": [None if w is None else w.tolist() for w in weights],
        "sum": weighted_sum(parts, weights)[:, 0].tolist(),
    }


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_softmax_weighs_both_paths(bias, ranks):
    (found,) = ranks(1).run(gate_weights, "softmax", bias)
    p_discrete = 1 / (1 + torch.tensor(bias).exp().item())
    assert found["weights"][0] == pytest.approx([1 - p_discrete] * 3)
    assert found["weights"][1] == pytest.approx([p_discrete] * 3)
    assert found["sum"] == pytest.approx([2 * (1 - p_discrete) + 5 * p_discrete] * 3)


def test_sigmoid_leaves_the_continuous_path_untouched(ranks):
    (found,) = ranks(1).run(gate_weights, "sigmoid", 3.0)
    p_discrete = 1 / (1 + torch.tensor(3.0).exp().item())
    assert found["weights"][0] is None
    assert found["weights"][1] == pytest.approx([p_discrete] * 3)
    assert found["sum"] == pytest.approx([2 + 5 * p_discrete] * 3)
