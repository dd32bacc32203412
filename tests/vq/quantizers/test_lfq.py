"""Codes of signs: the search, the entropy loss by its formula, and the shares that it reads."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.codebook import Codebook, build_codebook
from vqmoe_megatron.vq.codebook_update import StepStatistics
from vqmoe_megatron.vq.search import nearest_code

HIDDEN, BITS = 8, 4


def make(**settings: object) -> Codebook:
    vq = VQConfig(
        quantizer="lfq",
        code_dim=BITS,
        num_codes=2**BITS,
        init="uniform",
        freeze_codebook=True,
        codebook_update="gradient",
        **settings,
    )
    return build_codebook(vq, HIDDEN, seed=3)


def test_the_code_is_the_number_of_the_signs_and_the_nearest() -> None:
    codebook = make().double()
    prepared = codebook.prepare(torch.randn(500, HIDDEN, dtype=torch.float64))
    ids = codebook.search(prepared)[:, 0]
    for row, code in zip(prepared.tolist(), ids.tolist(), strict=True):
        assert code == int("".join("1" if z > 0 else "0" for z in row), 2)
    assert torch.equal(codebook.lookup(ids.unsqueeze(1)), prepared.sign())
    assert torch.equal(ids, nearest_code(prepared, codebook.code_vectors())[:, 0])
    assert codebook.search(torch.zeros(1, BITS)).item() == 0


def test_the_entropy_loss_is_that_of_codes_under_a_softmax_of_distances() -> None:
    """The bits' entropies sum to that of the K codes, by brute force over them."""
    codebook = make(entropy_loss_coeff=0.3).double()
    prepared = torch.randn(5, BITS, dtype=torch.float64)
    codes = codebook.code_vectors()[0].detach()
    total = 0.0
    for z in prepared:
        q = (-(z - codes).square().sum(dim=1)).softmax(dim=0)
        of_token = float(-(q * q.log()).sum())
        cross = float((q * math.log(2**BITS)).sum())  # usage is uniform
        total += of_token - cross
    found = codebook.extra_loss(prepared)
    assert float(found) == pytest.approx(0.3 * total / (5 * BITS), rel=1e-9)
    assert make(entropy_loss_coeff=0.0).extra_loss(prepared) is None


def test_its_gradient_is_that_of_the_entropy_of_the_mean() -> None:
    """d/dp of -H(q, p) is d/dm of -H(m) at m = q: unused bits are pulled to, used ones from."""
    codebook = make(entropy_loss_coeff=1.0).double()
    bits = (codebook.codes[0] > 0).double()
    usage = torch.rand(2**BITS, dtype=torch.float64) ** 3
    codebook.usage.copy_((usage / usage.sum()).unsqueeze(0))
    q = codebook.usage[0] @ bits
    z = torch.randn(1, BITS, dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(codebook.extra_loss(z), z)
    m = q.clone().requires_grad_()
    (of_mean,) = torch.autograd.grad((m * m.log() + (1 - m) * (1 - m).log()).sum(), m)
    p = (4 * z).sigmoid()
    entropy_of_p = -(p * p.log() + (1 - p) * (1 - p).log()).sum()
    (own,) = torch.autograd.grad(entropy_of_p, z)
    p = p.detach()
    torch.testing.assert_close(found * BITS, own + of_mean * 4 * p * (1 - p))


def test_usage_follows_the_tokens_and_codes_stay() -> None:
    codebook = make(ema_decay=0.8)
    codes = codebook.codes.detach().clone()
    x = codebook.prepare(torch.randn(64, HIDDEN))
    ids = codebook.search(x)
    codebook.record(x, ids, torch.arange(4))
    count = codebook.step_count.clone()
    codebook.apply_step(StepStatistics(count, None, codebook.step_candidates))
    torch.testing.assert_close(codebook.usage, 0.8 / 2**BITS + 0.2 * count / 64)
    assert torch.equal(codebook.codes, codes)
    kept = codebook.usage.clone()
    broken = torch.full_like(count, float("nan"))
    codebook.apply_step(StepStatistics(broken, None, None))
    assert torch.equal(codebook.usage, kept)


def test_an_extreme_share_and_a_sure_token_have_finite_gradients() -> None:
    codebook = make()
    codebook.usage.zero_()[0, 0] = 1.0  # every bit at 0
    z = (50 * torch.randn(9, BITS)).requires_grad_()
    loss = codebook.extra_loss(z)
    (gradient,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
