"""Codes of a vocabulary: a round equals loops, every code gets used, rounding decides nothing."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.vq import vocabulary_codes
from vqmoe_megatron.vq.memory_oracle import oracle_round

WIDTH = 6


def one_round(  # noqa: ANN201
    embeddings: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    codes: torch.Tensor,
    is_first: bool = False,
    num_shares: int = 1,
):
    """As ``CodeStream`` calls it, with the vocabulary cut over ``num_shares`` ranks."""
    shares = list(zip(*(t.chunk(num_shares) for t in (embeddings, weights, ids)), strict=True))
    sums = sum(vocabulary_codes.sums_of_codes(*share, codes.shape[0]) for share in shares)
    sums = torch.zeros_like(sums) if is_first else sums
    means = vocabulary_codes.means_of_codes(codes, sums)
    errors = torch.cat([vocabulary_codes.errors_of_entries(*share, means) for share in shares])
    chosen = vocabulary_codes.replacements(sums[:, -1], weights if is_first else errors)
    vectors, first = torch.zeros_like(codes), 0
    for of_share, _, _ in shares:
        vectors += vocabulary_codes.own_vectors(of_share, chosen, first)
        first += of_share.shape[0]
    codes = vocabulary_codes.moved_codes(means, chosen, vectors)
    return codes, torch.cat([vocabulary_codes.assign(share[0], codes) for share in shares])


def drawn(num_entries: int, num_codes: int, num_unseen: int = 0):  # noqa: ANN201
    generator = torch.Generator().manual_seed(num_entries + num_codes)
    embeddings = torch.randn(num_entries, WIDTH, generator=generator)
    weights = torch.rand(num_entries, generator=generator)
    weights[torch.randperm(num_entries, generator=generator)[:num_unseen]] = 0.0
    codes = torch.randn(num_codes, WIDTH, generator=generator)
    return embeddings, weights, torch.arange(num_entries) % num_codes, codes


@pytest.mark.parametrize("sizes", [(40, 5, 0), (40, 5, 20), (24, 24, 6), (16, 12, 12)], ids=str)
@pytest.mark.parametrize("num_shares", [1, 2, 4])
def test_rounds_equal_the_oracle(sizes: tuple[int, int, int], num_shares: int) -> None:
    embeddings, weights, ids, codes = drawn(*sizes)
    expected, their_ids = codes.double(), ids.tolist()
    for number in range(5):
        codes, ids = one_round(embeddings, weights, ids, codes, number == 0, num_shares)
        expected, their_ids = oracle_round(
            embeddings.double(), weights.tolist(), their_ids, expected, number == 0
        )
        torch.testing.assert_close(codes.double(), expected, rtol=1e-5, atol=1e-6)
        assert ids.tolist() == their_ids


def test_all_codes_come_to_be_used() -> None:
    embeddings, weights, ids, codes = drawn(200, 40)
    for number in range(12):
        codes, ids = one_round(embeddings, weights, ids, codes, number == 0)
    assert ids.unique().numel() == 40


def test_the_error_falls() -> None:
    embeddings, weights, ids, codes = drawn(200, 20)
    errors = []
    for number in range(12):
        codes, ids = one_round(embeddings, weights, ids, codes, number == 0)
        distances = (embeddings - codes[ids]).square().sum(dim=1)
        errors.append(float((weights * distances).sum()))
    assert errors[-1] < 0.9 * errors[0]


@pytest.mark.parametrize("num_unseen", [0, 10, 25])
def test_with_codes_to_spare_every_seen_entry_has_one_of_its_own_for_good(num_unseen: int) -> None:
    """Embeddings drift by more than rounding, and nothing moves: no second code comes to an entry,
    where rounding would choose between the two."""
    embeddings, weights, ids, codes = drawn(30, 30, num_unseen)
    generator = torch.Generator().manual_seed(5)
    seen = weights > 0
    kept = None
    for number in range(20):
        codes, ids = one_round(embeddings, weights, ids, codes, number == 0)
        assert ids[seen].unique().numel() == int(seen.sum())
        apart = torch.cdist(codes.double(), codes.double()) + torch.eye(30)
        assert float(apart.min()) > 1e-2
        kept = ids[seen] if kept is None else kept
        assert torch.equal(ids[seen], kept)
        embeddings = embeddings + 1e-3 * torch.randn(30, WIDTH, generator=generator)


def test_an_entry_that_is_seen_later_gets_an_idle_code() -> None:
    embeddings, weights, ids, codes = drawn(30, 30, num_unseen=3)
    for number in range(3):
        codes, ids = one_round(embeddings, weights, ids, codes, number == 0)
    weights = weights.clamp(min=0.01)
    for _ in range(2):
        codes, ids = one_round(embeddings, weights, ids, codes)
    assert ids.unique().numel() == 30


def test_equal_entries_share_a_code_and_the_other_stays_idle() -> None:
    embeddings = torch.randn(1, WIDTH).expand(4, WIDTH).contiguous()
    codes = torch.randn(3, WIDTH)
    weights, ids = torch.tensor([0.3, 0.1, 0.2, 0.4]), torch.tensor([1, 1, 1, 1])
    moved, ids = one_round(embeddings, weights, ids, codes)
    assert ids.tolist() == [1] * 4
    torch.testing.assert_close(moved[1], embeddings[0])
    assert torch.equal(moved[[0, 2]], codes[[0, 2]])


def test_replacements_by_hand() -> None:
    weight = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert vocabulary_codes.replacements(weight, torch.tensor([0.5, 0.0, 2.0])).tolist() == [
        2,
        -1,
        0,
        -1,  # the third entry has no error
    ]
    ties = vocabulary_codes.replacements(weight, torch.tensor([1.0, 3.0, 3.0, 1.0]))
    assert ties.tolist() == [1, -1, 2, 0]
    # more idle codes than entries
    assert vocabulary_codes.replacements(torch.zeros(3), torch.tensor([1.0])).tolist() == [
        0,
        -1,
        -1,
    ]


def test_unseen_weightless_entries_move_nothing() -> None:
    embeddings, weights, ids, codes = drawn(12, 4)
    moved, _ = one_round(embeddings, weights * 0, ids, codes)
    assert torch.equal(moved, codes)
