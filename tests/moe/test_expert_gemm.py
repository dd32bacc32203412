"""One product per expert: the grouped kernel, the fp64 loop, and experts without rows."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.moe.expert_gemm import grouped_linear

COUNTS = torch.tensor([3, 0, 5, 1])


def expected(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    expert = torch.repeat_interleave(torch.arange(4), COUNTS)
    return torch.stack([weight[e] @ row for e, row in zip(expert, rows, strict=True)])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)],
)
def test_values_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    rows = torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 24, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, 24, dtype=torch.float64)
    wanted = expected(rows, weight)
    wanted_grads = torch.autograd.grad(wanted, (rows, weight), upstream)
    found = grouped_linear(rows.to(dtype), weight.to(dtype), COUNTS)
    found_grads = torch.autograd.grad(found, (rows, weight), upstream.to(dtype))
    for a, b in zip((found, *found_grads), (wanted, *wanted_grads), strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_no_rows_at_all_still_gives_gradients() -> None:
    rows = torch.zeros(0, 16, requires_grad=True)
    weight = torch.randn(4, 24, 16, requires_grad=True)
    out = grouped_linear(rows, weight, torch.zeros(4, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, 24)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("equal_count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_counts_take_one_batched_product(equal_count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    rows = torch.randn(4 * equal_count, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, 24, 16, dtype=dtype, requires_grad=True)
    upstream = torch.randn(4 * equal_count, 24, dtype=dtype)
    counts = torch.full((4,), equal_count)
    results = []
    for given in (None, equal_count):
        out = grouped_linear(rows, weight, counts, given)
        results.append((out, *torch.autograd.grad(out, (rows, weight), upstream)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted)
    assert results[1][2].is_contiguous()
