"""The once-per-step codebook updates against loops over codes, written from their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_megatron.vq.codebook_update import (
    CodebookState,
    StepStatistics,
    ema_update,
    reanchor,
    update_usage,
)

C, K, D, M = 2, 5, 3, 16  # slices, codes, slice width, candidates


def state(seed: int = 0) -> CodebookState:
    generator = torch.Generator().manual_seed(seed)
    usage = torch.rand(C, K, generator=generator)
    usage = usage / usage.sum(dim=1, keepdim=True)
    codes = torch.randn(C, K, D, generator=generator)
    return CodebookState(codes, usage, codes * usage.unsqueeze(-1))


def candidates(seed: int = 1) -> torch.Tensor:
    return torch.randn(M, C, D, generator=torch.Generator().manual_seed(seed))


def test_ema_is_the_moving_average_of_counts_and_sums() -> None:
    old, decay = state(), 0.9
    count = torch.tensor([[4.0, 0, 3, 1, 0], [2.0, 2, 2, 2, 0]])
    total = torch.randn(C, K, D) * count.unsqueeze(-1)
    new = ema_update(old, StepStatistics(count, total, None), decay)
    for c in range(C):
        for k in range(K):
            share = float(count[c, k]) / 8
            usage = decay * float(old.usage[c, k]) + (1 - decay) * share
            ema_sum = decay * old.ema_sum[c, k] + (1 - decay) * total[c, k] / 8
            assert float(new.usage[c, k]) == pytest.approx(usage, rel=1e-6)
            torch.testing.assert_close(new.ema_sum[c, k], ema_sum)
            torch.testing.assert_close(new.codes[c, k], ema_sum / usage)
    torch.testing.assert_close(new.usage.sum(dim=1), torch.ones(C))


def test_ema_converges_to_the_mean_of_the_tokens_and_leaves_unused_codes() -> None:
    current = state()
    count = torch.tensor([[8.0, 8, 0, 0, 0], [0.0, 0, 16, 0, 0]])
    means = torch.randn(C, K, D)
    for _ in range(400):
        statistics = StepStatistics(count, means * count.unsqueeze(-1), None)
        current = ema_update(current, statistics, 0.9)
    used = count > 0
    torch.testing.assert_close(current.codes[used], means[used], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(current.codes[~used], state().codes[~used], atol=1e-4, rtol=1e-4)


def test_ema_does_not_depend_on_the_batch_size() -> None:
    count = torch.tensor([[4.0, 0, 3, 1, 0], [2.0, 2, 2, 2, 0]])
    total = torch.randn(C, K, D) * count.unsqueeze(-1)
    small = ema_update(state(), StepStatistics(count, total, None), 0.9)
    large = ema_update(state(), StepStatistics(100 * count, 100 * total, None), 0.9)
    torch.testing.assert_close(small.codes, large.codes)


def test_ema_refuses_statistics_without_sums() -> None:
    with pytest.raises(ValueError, match="needs ema_sum"):
        ema_update(state(), StepStatistics(torch.ones(C, K), None, None), 0.9)


def test_a_step_without_tokens_only_decays_usage() -> None:
    new = update_usage(state(), torch.zeros(C, K), 0.9)
    torch.testing.assert_close(new.usage, 0.9 * state().usage)
    assert torch.equal(new.codes, state().codes)


def test_reanchor_moves_each_code_by_its_rate_towards_a_candidate() -> None:
    decay = 0.99
    usage = torch.tensor([[0.0, 1e-4, 1e-3, 0.01, 0.9], [0.2, 0.2, 0.2, 0.2, 0.2]])
    old = CodebookState(state().codes, usage, None)
    new = reanchor(old, candidates(), decay, seed=3)
    for c in range(C):
        for k in range(K):
            rate = math.exp(-float(usage[c, k]) * K * 10 / (1 - decay) - 1e-3)
            moved = new.codes[c, k]
            options = [(1 - rate) * old.codes[c, k] + rate * token[c] for token in candidates()]
            errors = [float((moved - option).abs().max()) for option in options]
            assert min(errors) < 1e-5
    assert torch.equal(new.codes[1], old.codes[1])  # used codes stay
    assert not torch.allclose(new.codes[0, 0], old.codes[0, 0])  # dead codes go


def test_reanchor_draws_anchors_by_softmax_of_cosine() -> None:
    """cos 1 against cos -1 is odds of e^2 = 7.4 : 1, over 2,000 independent draws."""
    codes = torch.tensor([[[1.0, 0.0]]]).expand(1, 2000, 2).contiguous()
    tokens = torch.tensor([[[3.0, 0.0]], [[-5.0, 0.0]]])  # cosine ignores length
    new = reanchor(CodebookState(codes, torch.zeros(1, 2000), None), tokens, 0.99, seed=1)
    share = float((new.codes[0, :, 0] > 0).float().mean())
    assert share == pytest.approx(math.exp(1) / (math.exp(1) + math.exp(-1)), abs=0.03)


def test_reanchor_is_deterministic_in_its_seed() -> None:
    old = CodebookState(state().codes, torch.zeros(C, K), None)
    first = reanchor(old, candidates(), 0.9, seed=3).codes
    assert torch.equal(first, reanchor(old, candidates(), 0.9, seed=3).codes)
    assert not torch.equal(first, reanchor(old, candidates(), 0.9, seed=4).codes)


def test_reanchor_draws_no_row_that_nobody_filled() -> None:
    old = CodebookState(state().codes, torch.zeros(C, K), None)
    offered = candidates()
    padded = torch.cat([offered[:1], torch.zeros(30, C, D)])
    new = reanchor(old, padded, 0.9, seed=3)
    rate = math.exp(-1e-3)
    wanted = (1 - rate) * old.codes + rate * offered[0].unsqueeze(1)
    torch.testing.assert_close(new.codes, wanted)
    assert torch.equal(reanchor(old, torch.zeros(4, C, D), 0.9, seed=3).codes, old.codes)
