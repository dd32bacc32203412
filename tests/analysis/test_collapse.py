"""Collapsed experts and gradients of known rank are seen as such."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_megatron.analysis.collapse import (
    effective_rank,
    input_gradients,
    mean_cosine,
    num_different_experts,
    rank,
    singular_values,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 5, 12])
def test_equal_directions_count_each(size: int) -> None:
    values = singular_values(torch.eye(12)[:size])
    assert effective_rank(values) == pytest.approx(size)
    assert rank(values) == size


def test_a_matrix_of_few_directions_is_seen_through_fp32_rounding() -> None:
    low = draw(500, 3) @ draw(3, 64, seed=1)
    values = singular_values(low)
    assert rank(values) == 3
    assert 1.0 < effective_rank(values) < 3.001


def test_a_constant_is_nothing_once_centred() -> None:
    constant = torch.ones(20, 4)
    assert rank(singular_values(constant)) == 1
    assert rank(singular_values(constant, center=True)) == 0
    assert effective_rank(singular_values(constant, center=True)) == 0.0


def test_copies_of_one_expert_are_one() -> None:
    one = draw(1, 50, 16)
    assert num_different_experts(one.expand(8, -1, -1)) == pytest.approx(1.0, abs=1e-4)
    assert mean_cosine(one.expand(8, -1, -1)) == pytest.approx(1.0)


def test_unrelated_experts_are_as_many_as_they_are() -> None:
    outputs = draw(8, 400, 16)
    assert num_different_experts(outputs) > 7.9
    assert abs(mean_cosine(outputs)) < 0.02


def test_cosine_is_the_mean_over_pairs() -> None:
    rows = draw(5, 7)
    pairs = [
        float(torch.cosine_similarity(rows[i], rows[j], dim=0))
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert mean_cosine(rows) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert math.isnan(mean_cosine(rows[:1]))


def test_gradients_span_what_the_function_reads() -> None:
    weight, other = draw(24, 5), draw(5, 24, seed=1)
    gradients = input_gradients(
        lambda x: torch.tanh(x @ weight) @ other,
        draw(40, 24, seed=2),
        3,
        torch.Generator().manual_seed(3),
    )
    assert gradients.shape == (120, 24)
    assert rank(singular_values(gradients)) == 5


def test_a_router_s_gradients_span_at_most_its_experts() -> None:
    """Softmax's weights times held outputs: the claim of N, of which softmax takes one away."""
    num_experts, router = 6, draw(32, 6)
    outputs = draw(6, 32, seed=1)
    gradients = input_gradients(
        lambda x: torch.softmax(x @ router, dim=1) @ outputs,
        draw(200, 32, seed=2),
        2,
        torch.Generator().manual_seed(3),
    )
    assert rank(singular_values(gradients)) == num_experts - 1


def test_gradients_are_those_of_torch_func() -> None:
    x = draw(6, 4)
    found = input_gradients(torch.sin, x, 1, torch.Generator().manual_seed(3))
    _, product = torch.func.vjp(torch.sin, x)
    probe = torch.randn(6, 4, generator=torch.Generator().manual_seed(3))
    assert found.equal(product(probe)[0])


def test_an_output_without_the_input_has_no_gradient() -> None:
    weight = torch.ones(3, requires_grad=True)
    found = input_gradients(lambda x: weight.expand(4, 3), draw(4, 3), 1, torch.Generator())
    assert rank(singular_values(found)) == 0
