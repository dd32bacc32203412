"""A permuted codebook is told from a changed one, and both from chance."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.analysis.consistency import agreement, best_renaming, pair_counts

NUM_TOKENS, NUM_IDS = 4000, 16


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def choices(k: int = 1, seed: int = 1) -> torch.Tensor:
    """Different ids within a token, small ones more often."""
    weights = 1.0 / torch.arange(1, NUM_IDS + 1).expand(NUM_TOKENS, -1)
    return torch.multinomial(weights, k, generator=generator(seed))


@pytest.mark.parametrize("k", [1, 2])
def test_the_same_choices_agree(k: int) -> None:
    found = agreement(choices(k), choices(k), generator())
    assert (found.same, found.renamed, found.num_moved) == (1.0, 1.0, 0)
    assert found.renamed_by_chance < 0.6


@pytest.mark.parametrize("k", [1, 2])
def test_a_permuted_codebook_agrees_after_renaming_only(k: int) -> None:
    permutation = torch.arange(NUM_IDS).roll(5)
    found = agreement(choices(k), permutation[choices(k)], generator())
    assert found.same < 0.3
    assert (found.renamed, found.num_moved) == (1.0, NUM_IDS)


def test_random_codes_agree_as_by_chance() -> None:
    found = agreement(choices(seed=1), choices(seed=2), generator())
    assert found.renamed == pytest.approx(found.renamed_by_chance, abs=0.03)


def test_of_very_many_codes_the_used_ones_count() -> None:
    found = agreement(choices() * 10**9, choices() * 10**9 + 1, generator())
    assert (found.same, found.renamed) == (0.0, 1.0)


def test_order_within_a_token_is_no_change() -> None:
    found = agreement(choices(2), choices(2).flip(1), generator())
    assert found.same == 1.0


def test_the_renaming_is_the_best_of_all() -> None:
    counts = torch.rand(5, 5, dtype=torch.float64, generator=generator())
    found = float(counts[torch.arange(5), best_renaming(counts)].sum())
    from itertools import permutations

    best = max(sum(float(counts[i, j]) for i, j in enumerate(p)) for p in permutations(range(5)))
    assert found == pytest.approx(best, abs=1e-5)


def test_codes_that_nobody_chose_keep_their_names() -> None:
    counts = torch.zeros(6, 6, dtype=torch.float64)
    counts[0, 0] = counts[1, 1] = 9
    assert best_renaming(counts).tolist() == list(range(6))


def test_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="not of the same tokens"):
        pair_counts(choices(1), choices(2), NUM_IDS)
    with pytest.raises(ValueError, match="not of the same tokens"):
        agreement(choices(1), choices(2), generator())
    empty = torch.empty(0, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="no choice"):
        agreement(empty, empty, generator())
