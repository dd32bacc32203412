"""The kernels of the VQ losses against plain torch, as test_losses.py holds it to the formula."""

from __future__ import annotations

import pytest
import torch
from kernel_places import PLACES, run_kernel, skip_unless_possible

everywhere = pytest.mark.parametrize("place", PLACES)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7}  # the interpreter cuts to bf16, unrounded


def example(
    num_tokens: int, num_slices: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, num_slices * width, generator=generator).to(dtype)
    vectors = torch.randn(num_slices, 7, width, generator=generator)
    return x, vectors, torch.randint(7, (num_tokens, num_slices), generator=generator)


def differences(x: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    v = torch.cat([vectors[c][ids[:, c]] for c in range(len(vectors))], dim=1)
    return x.double() - v.double()


@everywhere
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_tokens", "num_slices", "width"), [(37, 1, 48), (5, 3, 7), (300, 2, 16), (2, 1, 1100)]
)
def test_value_and_gradient(
    place: str, num_tokens: int, num_slices: int, width: int, dtype: torch.dtype
) -> None:
    skip_unless_possible(place)
    from vqmoe_megatron.vq.losses_triton import error_gradient_triton, squared_error_triton

    parts = example(num_tokens, num_slices, width, dtype)
    wanted = differences(*parts)
    value = run_kernel(place, squared_error_triton, *parts)
    assert value.shape == () and value.dtype == torch.float32
    assert float(value) == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    at_loss = torch.tensor(-0.7)
    dx = run_kernel(place, error_gradient_triton, *parts, 0.3, at_loss)
    assert dx.dtype == dtype
    torch.testing.assert_close(dx.double(), wanted * 0.3 * -0.7, rtol=TOLERANCE[dtype], atol=1e-6)


@everywhere
def test_no_tokens(place: str) -> None:
    skip_unless_possible(place)
    from vqmoe_megatron.vq.losses_triton import error_gradient_triton, squared_error_triton

    parts = example(0, 2, 4, torch.float32)
    assert float(run_kernel(place, squared_error_triton, *parts)) == 0.0
    assert run_kernel(place, error_gradient_triton, *parts, 1.0, torch.ones(())).shape == (0, 8)


@everywhere
def test_strided_tokens_and_codes(place: str) -> None:
    skip_unless_possible(place)
    from vqmoe_megatron.vq.losses_triton import error_gradient_triton, squared_error_triton

    x, vectors, ids = example(40, 2, 6, torch.float32)
    wide = torch.cat([x, x], dim=1)[:, :12]
    turned = vectors.transpose(1, 2).contiguous().transpose(1, 2)
    assert not wide.is_contiguous() and not turned.is_contiguous()
    wanted = differences(x, vectors, ids)
    value = run_kernel(place, squared_error_triton, wide, turned, ids)
    assert float(value) == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    dx = run_kernel(place, error_gradient_triton, wide, turned, ids, 1.0, torch.ones(()))
    torch.testing.assert_close(dx.double(), wanted, rtol=1e-5, atol=1e-6)
