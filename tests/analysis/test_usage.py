"""Usage tells uniform, collapsed and dead apart."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.analysis.usage import choice_counts, entropy, usage_of


def test_uniform_use_is_all_and_balanced() -> None:
    found = usage_of(choice_counts(torch.arange(64).view(32, 2) % 8, 8))
    assert (found.num_chosen, found.num_dead) == (8, 0)
    assert found.perplexity == pytest.approx(8.0)
    assert found.imbalance == pytest.approx(1.0)


def test_dead_experts_are_counted() -> None:
    found = usage_of(choice_counts(torch.arange(30).view(-1, 1) % 3, 8))
    assert found.num_dead == 5
    assert found.perplexity == pytest.approx(3.0)
    assert found.imbalance == pytest.approx(8 / 3)


def test_one_expert_alone_is_a_collapse() -> None:
    found = usage_of(choice_counts(torch.full((10, 1), 3), 4))
    assert (found.perplexity, found.num_dead, found.imbalance) == pytest.approx((1.0, 3, 4.0))


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.4, outside of 0\.\.3"):
        choice_counts(torch.arange(5), 4)
    with pytest.raises(ValueError, match="no token"):
        usage_of(torch.zeros(4))
    assert entropy(torch.zeros(3)) == 0.0
