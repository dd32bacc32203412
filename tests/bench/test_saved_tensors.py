"""Saved bytes of graphs small enough to count by hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqmoe_megatron.bench.saved_tensors import saved_bytes


def count(forward, *excluded: torch.Tensor) -> int:  # noqa: ANN001
    return saved_bytes(forward, excluded)[0]


def test_a_product_saves_its_factors_but_not_the_excluded_ones() -> None:
    x, weight = torch.randn(5, 3, requires_grad=True), torch.randn(3, 7, requires_grad=True)

    def forward() -> torch.Tensor:
        return (x @ weight).exp().sum()  # saves x, weight, and exp's result [5, 7]

    assert count(forward) == 4 * (15 + 21 + 35)
    assert count(forward, x, weight) == 4 * 35


def test_views_of_one_storage_count_once() -> None:
    x = torch.randn(8, requires_grad=True)

    def forward() -> torch.Tensor:
        y = x * 2.0
        return (y.view(2, 4) * y.view(2, 4)).sum() + (y[:3] * y[:3]).sum()

    assert count(forward, x) == 4 * 8


def test_what_the_graph_drops_does_not_count() -> None:
    x = torch.randn(6, requires_grad=True)

    def forward() -> torch.Tensor:
        (x.exp() * x.sin()).sum()  # dropped
        return x.sum()

    assert count(forward) == 0


@dataclass(frozen=True)
class Held:
    table: torch.Tensor


class Keeps(torch.autograd.Function):
    """Holds tensors where no hook sees them: in a dataclass in a list, and in a closure."""

    @staticmethod
    def forward(ctx, x, held, action):  # noqa: ANN001, ANN205
        ctx.held, ctx.action = [held], action
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        return grad, None, None


def test_tensors_on_a_custom_context_count() -> None:
    x, table, captured = torch.randn(2, requires_grad=True), torch.randn(11), torch.randn(13)

    def forward() -> torch.Tensor:
        return Keeps.apply(x, Held(table), lambda: captured.sum()).sum()

    assert count(forward, x) == 4 * (11 + 13)


def test_the_output_can_still_be_differentiated() -> None:
    x = torch.randn(4, requires_grad=True)
    num_bytes, output = saved_bytes(lambda: x.square().sum(), [])
    output.backward()
    assert num_bytes == 16
    assert torch.equal(x.grad, 2 * x)
