"""Sums by id and table lookups: the formula, gradients, precision, and what is kept."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.vq.segment_sum import lookup_rows, segment_sum, sum_looked_up_rows

NUM_IDS = 6


def random_ids(num_tokens: int, *num_codes: int) -> torch.Tensor:
    """Id 4 never occurs."""
    ids = torch.randint(
        NUM_IDS - 1, (num_tokens, *num_codes), generator=torch.Generator().manual_seed(1)
    )
    return torch.where(ids == 4, 5, ids)


def test_sum_of_each_id_by_a_loop() -> None:
    rows, ids = torch.randn(40, 3, dtype=torch.float64), random_ids(40)
    expected = torch.zeros(NUM_IDS, 3, dtype=torch.float64)
    for row, i in zip(rows, ids.tolist(), strict=True):
        expected[i] += row
    torch.testing.assert_close(segment_sum(rows, ids, NUM_IDS), expected, rtol=1e-14, atol=1e-14)
    assert not expected[4].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_summed_in_fp32(dtype: torch.dtype) -> None:
    rows = torch.ones(5000, 2, dtype=dtype)  # bf16 would stop at 256, fp16 at 2048
    total = segment_sum(rows, torch.zeros(5000, dtype=torch.int64), 2)
    assert total.dtype == torch.float32
    assert total.tolist() == [[5000.0, 5000.0], [0.0, 0.0]]


def test_no_rows_give_zeros() -> None:
    total = segment_sum(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), NUM_IDS)
    assert torch.equal(total, torch.zeros(NUM_IDS, 3))


def test_bits_depend_on_the_order_of_an_ids_own_rows_only() -> None:
    rows, ids = 1e3 * torch.randn(500, 3), random_ids(500)
    sorted_by_id = torch.argsort(ids, stable=True)
    first = segment_sum(rows, ids, NUM_IDS)
    assert torch.equal(first, segment_sum(rows, ids, NUM_IDS))
    assert torch.equal(first, segment_sum(rows[sorted_by_id], ids[sorted_by_id], NUM_IDS))


@pytest.mark.parametrize("num_codes", [1, 3])
def test_lookup_is_the_scaled_sum_and_its_gradient(num_codes: int) -> None:
    table = torch.randn(NUM_IDS, 4, dtype=torch.float64, requires_grad=True)
    ids, scale = random_ids(12, num_codes), num_codes**-0.5
    found = sum_looked_up_rows(table, ids, scale, torch.float64)
    expected = scale * table[ids].sum(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    grad = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad(y, table, grad)[0] for y in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    assert not ours[4].any()


@pytest.mark.parametrize("num_codes", [1, 2])
def test_bf16_output_of_an_fp32_table_gets_an_fp32_gradient(num_codes: int) -> None:
    table = torch.full((2, 3), 1.5, requires_grad=True)
    ids = torch.zeros(2000, num_codes, dtype=torch.int64)
    y = sum_looked_up_rows(table, ids, 0.5, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and y.unique().tolist() == [0.75 * num_codes]
    y.backward(torch.ones_like(y))
    assert table.grad.dtype == torch.float32
    assert table.grad[0].tolist() == [1000.0 * num_codes] * 3 and not table.grad[1].any()


@pytest.mark.parametrize("num_codes", [1, 2])
def test_nothing_but_the_ids_is_kept(num_codes: int) -> None:
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    table = torch.randn(NUM_IDS, 4, requires_grad=True)
    ids = random_ids(12, num_codes)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sum_looked_up_rows(table, ids, 0.5, torch.bfloat16)
    assert [tensor.data_ptr() for tensor in kept] == [ids.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lookup_rows_is_indexing(dtype: torch.dtype) -> None:
    table = torch.randn(NUM_IDS, 4).to(dtype).requires_grad_()
    ids = random_ids(3000)
    rows = lookup_rows(table, ids)
    assert torch.equal(rows, table[ids]) and rows.dtype == dtype
    rows.backward(torch.ones_like(rows))
    counts = torch.bincount(ids, minlength=NUM_IDS).to(dtype)  # rounded once, not once per token
    assert table.grad.dtype == dtype
    assert torch.equal(table.grad, counts[:, None].expand(-1, 4))
