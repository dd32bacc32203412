"""The threshold: an exact quantile within a bin, the same wherever tokens are."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_megatron.moe.routing_threshold import (
    BINS_PER_OCTAVE,
    DECAY,
    HIGHEST_LOG2,
    LOWEST_LOG2,
    RoutingThreshold,
    kth_largest_score,
)
from vqmoe_megatron.plan.state_memory import NUM_THRESHOLD_SUMS

BIN = 2.0 ** (1 / BINS_PER_OCTAVE)  # ratio of a bin's ends


@pytest.fixture
def on_cpu(monkeypatch):  # noqa: ANN001, ANN201
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")


def drawn(seed: int, num_tokens: int = 200, num_experts: int = 8) -> tuple[torch.Tensor, ...]:
    """Scores and probabilities [T, N]."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(num_tokens, num_experts, generator=generator).softmax(dim=1)
    return probs * (0.2 + torch.rand(num_tokens, 1, generator=generator)), probs


def one_step(threshold: RoutingThreshold, parts: list[tuple[torch.Tensor, ...]]) -> dict:
    for scores, probs in parts:
        threshold.record(*threshold.count(scores, threshold.choose(scores, probs)))
    scalars = threshold.apply_parts(iter([part.clone() for part in threshold.local_parts()]))
    threshold.clear_step()
    return scalars


@pytest.mark.parametrize("seed", range(5))
def test_the_first_step_sets_tau_to_the_quantile_within_a_bin(seed: int, on_cpu) -> None:  # noqa: ANN001
    threshold = RoutingThreshold()
    scores, probs = drawn(seed)
    one_step(threshold, [(scores, probs)])
    exact = float(scores.flatten().sort(descending=True).values[len(scores) - 1])
    assert exact / BIN <= float(threshold.tau) <= exact * BIN
    chosen = threshold.choose(scores, probs)
    assert abs(int(chosen.sum()) / len(scores) - 1) < 0.05
    assert torch.equal(chosen, scores > threshold.tau)


def test_later_steps_move_it_by_a_tenth(on_cpu) -> None:  # noqa: ANN001
    threshold = RoutingThreshold()
    first, second = drawn(1), drawn(2)
    one_step(threshold, [first])
    before = float(threshold.tau)
    scalars = one_step(threshold, [(3 * second[0], second[1])])
    alone = RoutingThreshold()
    one_step(alone, [(3 * second[0], second[1])])
    moved = DECAY * before + (1 - DECAY) * float(alone.tau)
    assert float(threshold.tau) == pytest.approx(moved, rel=1e-6)
    assert float(scalars["routing_threshold"]) == before  # of the step as it was routed


def test_before_the_first_step_every_token_has_its_likeliest_expert(on_cpu) -> None:  # noqa: ANN001
    threshold = RoutingThreshold()
    scores, probs = drawn(3)
    chosen = threshold.choose(scores, probs)
    assert torch.equal(chosen.float().argmax(dim=1), probs.argmax(dim=1))
    assert chosen.sum(dim=1).tolist() == [1] * len(scores)
    scalars = one_step(threshold, [(scores, probs)])
    shares = {name: float(value) for name, value in scalars.items()}
    assert shares == {
        "exact_experts_per_token": 1.0,
        "routing_threshold": 0.0,
        "tokens_without_exact_expert": 0.0,
        "tokens_with_one_exact_expert": 1.0,
        "tokens_with_several_exact_experts": 0.0,
    }


def test_the_shares_are_those_of_the_chosen_pairs(on_cpu) -> None:  # noqa: ANN001
    threshold = RoutingThreshold()
    scores, probs = drawn(4)
    threshold.tau.fill_(0.12)
    per_token = (scores > 0.12).sum(dim=1)
    scalars = one_step(threshold, [(scores[:77], probs[:77]), (scores[77:], probs[77:])])
    for name, is_such in (
        ("tokens_without_exact_expert", per_token == 0),
        ("tokens_with_one_exact_expert", per_token == 1),
        ("tokens_with_several_exact_experts", per_token > 1),
    ):
        assert 0 < float(is_such.float().mean()) < 1
        assert float(scalars[name]) == pytest.approx(float(is_such.float().mean()))
    mean = float(per_token.float().mean())
    assert float(scalars["exact_experts_per_token"]) == pytest.approx(mean)


def test_how_tokens_are_cut_does_not_matter_to_the_last_bit(on_cpu) -> None:  # noqa: ANN001
    scores, probs = drawn(5)
    found = set()
    for size in (200, 50, 7):
        threshold = RoutingThreshold()
        one_step(threshold, list(zip(scores.split(size), probs.split(size), strict=True)))
        found.add(float(threshold.tau))
    assert len(found) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_step_leaves_tau(value: float, on_cpu) -> None:  # noqa: ANN001
    threshold = RoutingThreshold()
    one_step(threshold, [drawn(6)])
    before = float(threshold.tau)
    scores, probs = drawn(7)
    scores[3, 2] = value
    one_step(threshold, [(scores, probs)])
    assert float(threshold.tau) == before > 0
    one_step(threshold, [])  # and one of no token
    assert float(threshold.tau) == before


def test_a_discarded_step_leaves_nothing_behind(on_cpu) -> None:  # noqa: ANN001
    threshold, other = RoutingThreshold(), RoutingThreshold()
    threshold.record(*threshold.count(*drawn(8)))
    threshold.clear_step()
    for one in (threshold, other):
        one_step(one, [drawn(9)])
    assert float(threshold.tau) == float(other.tau)


def test_scores_beyond_the_range_lie_in_its_end_bins(on_cpu) -> None:  # noqa: ANN001
    scores = torch.tensor([[0.0, 2.0 ** (LOWEST_LOG2 - 5), 2.0 ** (HIGHEST_LOG2 + 5), 1.0]])
    counts, _ = RoutingThreshold().count(scores, scores > 1)
    assert (counts[0], counts[-1], counts.sum()) == (2, 1, 4)


def test_a_quantile_lies_linearly_in_its_bin() -> None:
    counts = torch.zeros(64 * BINS_PER_OCTAVE)
    counts[2048], counts[2100] = 4, 1  # the first begins at score 1
    highest = kth_largest_score(counts, torch.tensor(1.0))
    assert math.log2(highest) == pytest.approx(52 / BINS_PER_OCTAVE)
    for k, share in ((2, 0.75), (3, 0.5), (5, 0.0)):
        found = kth_largest_score(counts, torch.tensor(float(k)))
        assert math.log2(found) * BINS_PER_OCTAVE == pytest.approx(share, abs=1e-9)


def test_tau_keeps_fp32_in_a_model_that_is_cast(on_cpu) -> None:  # noqa: ANN001
    threshold = RoutingThreshold()
    one_step(threshold, [drawn(1)])
    before = threshold.tau.clone()
    assert torch.equal(threshold.bfloat16().tau, before)
    assert {b.dtype for b in threshold.buffers()} == {torch.float32}
    assert list(threshold.state_dict()) == ["tau"]


def test_the_plan_knows_how_many_sums_there_are(on_cpu) -> None:  # noqa: ANN001
    parts = RoutingThreshold().local_parts()
    assert sum(part.numel() for part in parts) == NUM_THRESHOLD_SUMS
