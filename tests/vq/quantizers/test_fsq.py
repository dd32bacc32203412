"""Rounding to a grid is the search of its nearest point; the grid never moves."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.codebook import Codebook, build_codebook
from vqmoe_megatron.vq.codebook_update import StepStatistics
from vqmoe_megatron.vq.search import nearest_code

HIDDEN = 8


def make(levels: list[int], **settings: object) -> Codebook:
    vq = VQConfig(
        quantizer="fsq",
        fsq_levels=levels,
        code_dim=len(levels),
        num_codes=int(torch.tensor(levels).prod()),
        init="uniform",
        freeze_codebook=True,
        codebook_update="gradient",
        **settings,
    )
    return build_codebook(vq, HIDDEN, seed=3)


@pytest.mark.parametrize("levels", [[2], [3], [5, 3], [8, 5, 5], [2, 2, 2, 7]])
def test_codes_are_all_points_of_the_grid_in_the_order_of_their_numbers(levels: list[int]) -> None:
    codebook = make(levels)
    values = [[2 * i / (count - 1) - 1 for i in range(count)] for count in levels]
    expected = torch.tensor(list(product(*values)))
    torch.testing.assert_close(codebook.code_vectors()[0], expected, rtol=0, atol=1e-6)
    assert not codebook.codes.requires_grad
    codebook.reseed(99)
    torch.testing.assert_close(codebook.code_vectors()[0], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("levels", [[2], [3], [5, 3], [8, 5, 5], [2, 2, 2, 7]])
def test_rounding_finds_the_nearest_code(levels: list[int]) -> None:
    codebook = make(levels).double()
    x = 2 * torch.randn(2000, HIDDEN, dtype=torch.float64)
    prepared = codebook.prepare(x)
    assert prepared.abs().max() < 1
    ids = codebook.search(prepared)
    assert torch.equal(ids, nearest_code(prepared, codebook.code_vectors().detach()))
    assert ids.unique().numel() > codebook.num_codes // 3
    every = codebook.codes[0].detach()  # a code is its own
    assert codebook.search(every)[:, 0].tolist() == list(range(codebook.num_codes))


def test_a_tie_and_what_lies_outside_go_where_the_nearest_code_would() -> None:
    codebook = make([3, 2])
    prepared = torch.tensor([[-0.5, 0.0], [0.5, 0.0], [9.0, -9.0], [-9.0, 9.0]])
    assert codebook.search(prepared)[:, 0].tolist() == [0, 2, 4, 1]


@pytest.mark.parametrize("levels", [[3], [5, 4], [8, 5, 5]])
def test_a_token_that_is_not_finite_has_a_code_too(levels: list[int]) -> None:
    codebook = make(levels)
    x = torch.randn(3, HIDDEN)
    x[0, 0], x[1, 0] = float("nan"), float("inf")
    ids = codebook.search(codebook.prepare(x))
    # A broken step shows in its loss, not in an index.
    assert codebook.lookup(ids).shape == (3, len(levels))


def test_the_gradient_of_the_space_is_that_of_tanh_behind_the_projection() -> None:
    codebook = make([5, 3]).double()
    x = torch.randn(6, HIDDEN, dtype=torch.float64).requires_grad_()
    g = torch.randn(6, 2, dtype=torch.float64)
    (dx,) = torch.autograd.grad(codebook.prepare(x), x, g)
    z = x.detach() @ codebook.projection.t()
    torch.testing.assert_close(dx, ((1 - z.tanh() ** 2) * g) @ codebook.projection)


def test_a_step_counts_codes_and_moves_nothing() -> None:
    codebook = make([5, 3])
    before = {name: value.clone() for name, value in codebook.state_dict().items()}
    x = codebook.prepare(torch.randn(30, HIDDEN))
    codebook.record(x, codebook.search(x), torch.arange(4))
    count = codebook.step_count.clone()
    metrics = codebook.apply_step(StepStatistics(count, None, codebook.step_candidates))
    assert count.sum() == 30 and metrics["codes_in_use"] == (count > 0).sum()
    assert metrics["codebook_frozen"] == 1 and metrics["revived_codes"] == 0
    for name, value in codebook.state_dict().items():
        assert name == "num_steps" or torch.equal(value, before[name]), name
