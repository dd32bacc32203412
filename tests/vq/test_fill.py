"""The read of fill against a loop over tokens: values, gradients, and what it holds."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.vq.fill import SMALLEST_BLOCK, _Blocks, fill_from_table


def drawn(num_tokens: int, num_experts: int, num_codes: int, hidden: int = 6) -> tuple:
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    table = torch.randn(
        num_experts, num_codes, hidden, generator=generator, dtype=torch.float64
    ).requires_grad_()
    weights = torch.rand(
        num_tokens, num_experts, generator=generator, dtype=torch.float64
    ).requires_grad_()
    codes = torch.randint(0, num_codes, (num_tokens,), generator=generator)
    return table, weights, codes


def loop(table: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    rows = [
        sum(weights[t, j] * table[j, int(code)] for j in range(table.shape[0]))
        for t, code in enumerate(codes)
    ]
    return torch.stack(rows) if rows else table.new_zeros(0, table.shape[2])


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_codes"),
    [(1, 1, 1), (7, 4, 3), (100, 4, 3), (130, 40, 5), (64, 3, 90), (0, 4, 3)],
)
def test_equals_a_loop(num_tokens: int, num_experts: int, num_codes: int) -> None:
    table, weights, codes = drawn(num_tokens, num_experts, num_codes)
    expected = loop(table, weights, codes)
    found = fill_from_table(table, weights, codes)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    if not num_tokens:
        return
    g = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad((found * g).sum(), (table, weights)),
        torch.autograd.grad((expected * g).sum(), (table, weights)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_all_tokens_of_one_code() -> None:
    table, weights, codes = drawn(3 * SMALLEST_BLOCK + 1, 4, 5)
    codes = torch.full_like(codes, 4)
    torch.testing.assert_close(fill_from_table(table, weights, codes), weights @ table[:, 4])


def test_a_table_without_gradient_asks_for_none() -> None:
    table, weights, codes = drawn(20, 4, 3)
    fill_from_table(table.detach(), weights, codes).sum().backward()
    expected = table.detach()[:, codes].sum(dim=2).t()
    torch.testing.assert_close(weights.grad, expected)


def test_gradients_of_halved_weights_have_the_weights_dtype() -> None:
    table, weights, codes = drawn(20, 4, 3)
    half = weights.detach().bfloat16().requires_grad_()
    y = fill_from_table(table.detach().float().requires_grad_(), half, codes)
    y.sum().backward()
    assert (y.dtype, half.grad.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("codes", [[0] * 70, [0, 1, 2] * 30, [2] * 33 + [0]])
def test_blocks_hold_one_code_and_every_token_once(codes: list[int]) -> None:
    blocks = _Blocks.of(torch.tensor(codes), 3, 4)
    assert blocks.code.numel() == len(codes) // SMALLEST_BLOCK + 3  # whatever the codes are
    assert len(set(blocks.place.tolist())) == len(codes)
    assert blocks.code[blocks.place // blocks.size].tolist() == codes


def test_no_row_per_token_and_expert_is_stored(monkeypatch) -> None:  # noqa: ANN001
    num_tokens, num_experts, hidden = 512, 32, 6
    table, weights, codes = drawn(num_tokens, num_experts, 4, hidden)
    largest, real = [], torch.bmm

    def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        largest.append(max(a.numel(), b.numel()))
        return real(a, b)

    monkeypatch.setattr(torch, "bmm", bmm)
    fill_from_table(table, weights, codes).sum().backward()
    blocks = num_tokens // 32 + 4
    assert len(largest) == 3
    assert max(largest) == blocks * 32 * num_experts < num_tokens * num_experts * hidden / 4
