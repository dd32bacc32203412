"""The two VQ losses: value, which side each gradient reaches, precision."""

from __future__ import annotations

import torch

from vqmoe_megatron.vq.losses import codebook_loss, commitment_loss


def test_values_are_means_over_all_elements() -> None:
    x, v = torch.randn(5, 4), torch.randn(5, 4)
    expected = sum(float((x[t, h] - v[t, h]) ** 2) for t in range(5) for h in range(4)) / 20
    for loss in (commitment_loss(x, v), codebook_loss(x, v)):
        torch.testing.assert_close(float(loss), expected, rtol=1e-5, atol=0)


def test_each_gradient_reaches_one_side_only() -> None:
    x, v = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    commitment_loss(x, v).backward()
    assert v.grad is None
    torch.testing.assert_close(x.grad, 2 * (x - v).detach() / 20)
    x.grad = None
    codebook_loss(x, v).backward()
    assert x.grad is None
    torch.testing.assert_close(v.grad, 2 * (v - x).detach() / 20)


def test_bf16_tokens_are_measured_in_fp32_and_fp64_in_fp64() -> None:
    x = torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    v = torch.full((1, 4), 1.0 + 2**-10)
    loss = commitment_loss(x, v)
    assert loss.dtype == torch.float32 and float(loss) == 2**-20
    assert commitment_loss(x.double(), v.double()).dtype == torch.float64
