"""Code usage of one step and over steps."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_megatron.vq.code_usage import IN_USE_SHARE, RecentUsage, code_perplexity


def test_perplexity_is_the_exponential_of_the_entropy() -> None:
    assert float(code_perplexity(torch.full((1, 8), 5.0))) == pytest.approx(8.0)
    assert float(code_perplexity(torch.tensor([[9.0, 0, 0]]))) == pytest.approx(1.0)
    mixed = torch.tensor([[1.0, 1, 2], [4.0, 0, 0]])  # mean over slices
    entropy = 0.5 * math.log(4) + 0.5 * math.log(2)
    assert float(code_perplexity(mixed)) == pytest.approx((math.exp(entropy) + 1) / 2)
    assert float(code_perplexity(torch.zeros(1, 4))) == pytest.approx(1.0)


def test_recent_usage_is_the_moving_average_of_shares_from_the_first_step_on() -> None:
    usage, decay = RecentUsage(2, 4), 0.75
    counts = [torch.randint(0, 9, (2, 4)).float() + 1 for _ in range(5)]
    wanted = counts[0] / counts[0].sum(dim=1, keepdim=True)
    usage.add(counts[0], decay)
    for count in counts[1:]:
        wanted = decay * wanted + (1 - decay) * count / count.sum(dim=1, keepdim=True)
        usage.add(count, decay)
    torch.testing.assert_close(usage.share, wanted)
    usage.forget()
    usage.add(counts[1], decay)
    torch.testing.assert_close(usage.share, counts[1] / counts[1].sum(dim=1, keepdim=True))


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_step_without_tokens_or_with_nan_is_none(value: float) -> None:
    usage = RecentUsage(1, 2)
    usage.add(torch.tensor([[1.0, 3.0]]), 0.5)
    usage.add(torch.tensor([[0.0, value]]), 0.5)
    assert usage.share.tolist() == [[0.25, 0.75]]


def test_a_code_is_in_use_from_a_tenth_of_uniform_on() -> None:
    usage = RecentUsage(2, 10)
    share = IN_USE_SHARE / 10
    usage.share[0, :3] = torch.tensor([share * 1.01, share * 0.99, 0.9])
    usage.share[1, 0] = 1.0
    assert float(usage.num_in_use()) == 3
    assert usage.state_dict() == {}
