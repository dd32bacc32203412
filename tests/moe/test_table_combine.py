"""Reading the table while combining equals the plain formula, output and every gradient."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.moe.table_combine import combine_with_table

NUM_TOKENS, HIDDEN, NUM_ROWS = 37, 8, 11
SCALE = 0.6


def drawn(num_slices: int, has_first_weight: bool) -> dict:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    return {
        "y_continuous": draw(NUM_TOKENS, HIDDEN),
        "p_continuous": draw(NUM_TOKENS) if has_first_weight else None,
        "p_discrete": draw(NUM_TOKENS),
        "table": draw(NUM_ROWS, HIDDEN),
        "x": draw(NUM_TOKENS, HIDDEN),
        "ids": torch.randint(0, NUM_ROWS, (NUM_TOKENS, num_slices), generator=generator),
    }


def double(grad: torch.Tensor) -> torch.Tensor:
    return 2 * grad


@pytest.mark.parametrize("has_first_weight", [True, False], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("num_slices", [1, 3])
@pytest.mark.parametrize("gradient", [None, double], ids=["none", "straight-through"])
def test_output_and_gradients(num_slices, has_first_weight, gradient):
    parts = drawn(num_slices, has_first_weight)
    y, x = parts["y_continuous"], parts["x"]
    weights = parts["p_continuous"], parts["p_discrete"]
    output = combine_with_table(y, weights, parts["table"], parts["ids"], SCALE, x, gradient)

    discrete = SCALE * parts["table"][parts["ids"]].sum(dim=1)
    if gradient is not None:
        discrete = discrete + 2 * (x - x.detach())
    first = y if weights[0] is None else weights[0].unsqueeze(1) * y
    expected = first + weights[1].unsqueeze(1) * discrete
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)

    named = {
        name: value
        for name, value in parts.items()
        if value is not None and value.requires_grad and (name != "x" or gradient is not None)
    }
    grad = torch.randn(
        output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    )
    ours = torch.autograd.grad(output, list(named.values()), grad)
    theirs = torch.autograd.grad(expected, list(named.values()), grad)
    for name, found, wanted in zip(named, ours, theirs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13, msg=name)


def test_a_token_that_needs_no_gradient_costs_none():
    parts = drawn(1, True)

    def refuse(grad: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked for a gradient that nobody needs")

    weights = parts["p_continuous"], parts["p_discrete"]
    x = parts["x"].detach()
    args = (parts["y_continuous"], weights, parts["table"], parts["ids"], SCALE)
    combine_with_table(*args, x, refuse).sum().backward()
    with pytest.raises(AssertionError, match="nobody needs"):
        combine_with_table(*args, x.requires_grad_(), refuse).sum().backward()


def test_the_discrete_output_is_not_kept():
    parts = drawn(1, True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.untyped_storage().data_ptr()) or tensor, lambda t: t
    ):
        weights = parts["p_continuous"], parts["p_discrete"]
        combine_with_table(
            parts["y_continuous"], weights, parts["table"], parts["ids"], 1.0, parts["x"], None
        )
    given = {v.untyped_storage().data_ptr() for v in parts.values() if v is not None}
    assert kept and set(kept) <= given
