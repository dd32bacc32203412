"""The expert inputs: exact values, Jacobians, and no gradient to the codebook. T = 3 tokens."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.discrete_input import mixed_input

RATE = 0.3
HIDDEN = 8


def tokens_and_codes() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, 3, HIDDEN, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), v.requires_grad_()


MIXED = [("blend", 1 - 2 * RATE, RATE, 1 - RATE), ("blend_convex", 1 - RATE, RATE, 1.0)]
MIXED += [("token", 1.0, 0.0, 1.0)]


@pytest.mark.parametrize(("expert_input", "of_x", "of_v", "slope"), MIXED)
@pytest.mark.parametrize("num_slices", [1, 4])
def test_value_and_jacobian_of_mixed_inputs(
    expert_input: str, of_x: float, of_v: float, slope: float, num_slices: int
) -> None:
    product = {"quantizer": "product", "num_code_slices": num_slices} if num_slices > 1 else {}
    vq = VQConfig(expert_input=expert_input, contribution_rate=RATE, **product)
    x, v = tokens_and_codes()
    value = mixed_input(x, v, vq)
    assert value.shape == (3, num_slices, HIDDEN)
    for row in value.unbind(1):  # every row is the same vector
        torch.testing.assert_close(row, of_x * x + of_v * v)
    value.sum().backward()
    assert v.grad is None
    jacobian = torch.autograd.functional.jacobian(
        lambda token: mixed_input(token, v[:1], vq), x[:1]
    )
    eye = torch.eye(HIDDEN, dtype=torch.float64)
    for of_row in jacobian.view(num_slices, HIDDEN, HIDDEN):
        torch.testing.assert_close(of_row, slope * eye)


def test_fp32_codes_take_the_dtype_of_tokens() -> None:
    x, v = (part.detach() for part in tokens_and_codes())
    mixed = mixed_input(x.bfloat16(), v.float(), VQConfig(expert_input="blend"))
    assert mixed.dtype == torch.bfloat16
