"""A code that is the token says all about it; a random code says nothing beyond its chance."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_megatron.analysis.meaning import meaning_of, mutual_information, table_of_counts
from vqmoe_megatron.analysis.usage import entropy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TOKENS = torch.multinomial(
    1.0 / torch.arange(1.0, 31.0), 6000, replacement=True, generator=generator(1)
)


def test_a_code_that_is_the_token_has_the_token_s_entropy() -> None:
    found = meaning_of(TOKENS * 7 + 3, TOKENS, generator())
    assert found.information_nats == pytest.approx(found.class_entropy_nats)
    assert found.class_entropy_nats == pytest.approx(entropy(torch.bincount(TOKENS)))
    assert found.purity == 1.0
    assert found.information_by_chance < 0.15
    assert found.purity_by_chance < 0.35


def test_random_codes_say_what_chance_says() -> None:
    codes = torch.randint(0, 16, TOKENS.shape, generator=generator(2))
    found = meaning_of(codes, TOKENS, generator())
    assert found.information_nats == pytest.approx(found.information_by_chance, abs=0.01)
    assert found.information_nats > 0.02  # which without the baseline would look like meaning
    assert found.purity == pytest.approx(found.purity_by_chance, abs=0.01)


def test_one_code_for_all_says_nothing() -> None:
    found = meaning_of(torch.zeros_like(TOKENS), TOKENS, generator())
    assert found.information_nats == pytest.approx(0.0, abs=1e-9)


def test_information_is_the_sum_of_the_definition() -> None:
    counts = torch.rand(4, 6, dtype=torch.float64, generator=generator(3))
    share = counts / counts.sum()
    rows, columns = share.sum(1), share.sum(0)
    by_hand = sum(
        float(share[i, j]) * math.log(float(share[i, j] / (rows[i] * columns[j])))
        for i in range(4)
        for j in range(6)
    )
    assert mutual_information(counts) == pytest.approx(by_hand)


def test_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="the same tokens"):
        table_of_counts(TOKENS[:-1], TOKENS)
