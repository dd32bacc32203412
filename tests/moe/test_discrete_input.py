"""The expert inputs: exact values, Jacobians, and no gradient to the codebook. T = 3 tokens."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.config import VQConfig

pytestmark = pytest.mark.distributed

RATE = 0.3
HIDDEN = 8


def jacobians(settings: dict) -> dict:
    """In a rank: the input's value, its Jacobian in one token and its gradient to the codes."""
    from vqmoe_megatron.moe.discrete_input import discrete_input

    vq = VQConfig(**settings)
    x, v = torch.randn(3, HIDDEN).double(), torch.randn(3, HIDDEN).double().requires_grad_()
    value = discrete_input(x, v, vq)
    jacobian = torch.autograd.functional.jacobian(
        lambda token: discrete_input(token, v[:1], vq), x[:1]
    )
    return {
        "x": x,
        "v": v.detach(),
        "value": value.detach(),
        "jacobian": jacobian.view(-1, HIDDEN, HIDDEN),  # [C, H out, H in]
        "reaches_codes": value.requires_grad,
    }


@pytest.mark.parametrize(
    ("settings", "of_x", "of_v", "slope"),
    [
        ({"expert_input": "code"}, 0.0, 1.0, 1.0),
        ({"expert_input": "code", "straight_through": "none"}, 0.0, 1.0, 0.0),
        ({"expert_input": "code", "straight_through": "identity"}, 0.0, 1.0, 0.0),
        ({"expert_input": "blend"}, 1 - 2 * RATE, RATE, 1 - RATE),
        ({"expert_input": "blend_convex"}, 1 - RATE, RATE, 1.0),
        ({"expert_input": "token"}, 1.0, 0.0, 1.0),
    ],
)
def test_value_and_jacobian(ranks, settings: dict, of_x: float, of_v: float, slope: float) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(jacobians, {**settings, "contribution_rate": RATE})
    torch.testing.assert_close(found["value"][:, 0], of_x * found["x"] + of_v * found["v"])
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(found["jacobian"][0], slope * eye)
    assert not found["reaches_codes"]


def test_code_values_are_exact_not_rounded_through_the_token(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(jacobians, {"expert_input": "code"})
    assert torch.equal(found["value"][:, 0], found["v"])


def test_product_codes_fill_their_own_slices(ranks) -> None:  # noqa: ANN001
    settings = {"expert_input": "code", "quantizer": "product", "num_code_slices": 4}
    (found,) = ranks(1).run(jacobians, settings)
    expected = torch.zeros(3, 4, HIDDEN, dtype=torch.float64)
    slopes = torch.zeros(4, HIDDEN, HIDDEN, dtype=torch.float64)
    for c in range(4):
        own = slice(2 * c, 2 * c + 2)
        expected[:, c, own] = found["v"][:, own]
        slopes[c, own, own] = torch.eye(2, dtype=torch.float64)
    assert torch.equal(found["value"], expected)
    assert torch.equal(found["jacobian"], slopes)
