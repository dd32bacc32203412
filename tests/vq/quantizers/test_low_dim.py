"""The trained projection: rows of length one, the tokens' gradient, and none through the lift."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.codebook import Codebook, build_codebook

HIDDEN, WIDTH = 8, 3


def make(**settings: object) -> Codebook:
    vq = VQConfig(num_codes=6, init="uniform", quantizer="low_dim", code_dim=WIDTH, **settings)
    return build_codebook(vq, HIDDEN, seed=3)


def test_it_starts_as_the_fixed_one_and_is_a_parameter_under_the_same_name() -> None:
    fixed, trained = make(), make(train_projection=True)
    assert [name for name, _ in fixed.named_parameters()] == ["codes"]
    assert [name for name, _ in trained.named_parameters()] == ["codes", "projection"]
    assert fixed.state_dict().keys() == trained.state_dict().keys()
    assert torch.equal(fixed.projection, trained.projection)
    x = torch.randn(20, HIDDEN)
    torch.testing.assert_close(fixed.prepare(x), trained.prepare(x))
    for codebook in (fixed, trained):
        codebook.reseed(11)
    assert torch.equal(fixed.projection, trained.projection)
    assert trained.projection.requires_grad


def test_in_a_frozen_codebook_it_is_there_and_stays() -> None:
    frozen, trained = make(train_projection=True, freeze_codebook=True), make(train_projection=True)
    assert not frozen.projection.requires_grad
    assert frozen.state_dict().keys() == trained.state_dict().keys()


def test_its_length_does_not_matter() -> None:
    codebook, x = make(train_projection=True).double(), torch.randn(20, HIDDEN).double()
    before, lifted = codebook.prepare(x), codebook.lift(torch.eye(WIDTH).double())
    with torch.no_grad():
        codebook.projection.mul_(torch.tensor([[3.0], [0.2], [1.7]]))
    torch.testing.assert_close(codebook.prepare(x), before)
    torch.testing.assert_close(codebook.lift(torch.eye(WIDTH).double()), lifted)


def test_the_tokens_gradient_reaches_it_and_the_lift_passes_none() -> None:
    codebook, x = make(train_projection=True).double(), torch.randn(20, HIDDEN).double()
    with torch.no_grad():
        codebook.projection.add_(0.3 * torch.randn(WIDTH, HIDDEN))
    g = torch.randn(20, WIDTH, dtype=torch.float64)

    def value(projection: torch.Tensor) -> torch.Tensor:
        rows = projection / projection.norm(dim=1, keepdim=True)
        return ((x @ rows.t()) * g).sum()

    (codebook.prepare(x) * g).sum().backward()
    wanted = torch.autograd.functional.jacobian(value, codebook.projection.detach())
    torch.testing.assert_close(codebook.projection.grad, wanted)
    assert not codebook.lift(torch.randn(4, WIDTH)).requires_grad
    vectors, grads = torch.randn(4, WIDTH).double(), torch.randn(4, HIDDEN).double()
    lifted, lowered = (
        (codebook.lift(vectors) * grads).sum(),
        (codebook.lower(grads) * vectors).sum(),
    )
    assert float(lifted) == pytest.approx(float(lowered))  # each the other's transpose
