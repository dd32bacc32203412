"""Initial codes: ranges, choice without replacement, jitter on repeats, k-means, determinism."""

from __future__ import annotations

import warnings

import pytest
import torch

from vqmoe_megatron.vq.codebook_init import (
    SAME_VECTOR,
    data_codes,
    different_rows,
    kmeans_codes,
    uniform_codes,
)


def sample(num_tokens: int, num_slices: int = 2, width: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_tokens, num_slices, width, generator=generator)


def test_uniform_fills_the_cube_and_depends_on_its_seed_only() -> None:
    codes = uniform_codes(2, 500, 4, seed=1)
    assert codes.shape == (2, 500, 4) and codes.dtype == torch.float32
    assert -1 <= float(codes.min()) < -0.98 and 0.98 < float(codes.max()) <= 1
    torch.manual_seed(0)
    assert torch.equal(codes, uniform_codes(2, 500, 4, seed=1))
    assert not torch.equal(codes, uniform_codes(2, 500, 4, seed=2))


@pytest.mark.parametrize("build", [data_codes, kmeans_codes])
def test_data_inits_are_deterministic_and_leave_the_global_generator_alone(build) -> None:  # noqa: ANN001
    torch.manual_seed(5)
    before = torch.get_rng_state()
    codes = build(sample(40), 8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(codes, build(sample(40), 8, seed=1))
    assert not torch.equal(codes, build(sample(40), 8, seed=2))


def test_data_codes_are_distinct_sample_tokens() -> None:
    tokens = sample(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes = data_codes(tokens, 10, seed=1)
    for c in range(2):
        rows = {tuple(row) for row in codes[c].tolist()}
        assert rows == {tuple(row) for row in tokens[:, c].tolist()}


def test_tokens_equal_but_for_rounding_give_one_code() -> None:
    different = sample(6, num_slices=1)
    blanks = different[:1].repeat(200, 1, 1) * (1 + 1e-6 * sample(200, 1))
    codes = data_codes(torch.cat([blanks, different[1:]]), 6, seed=1)[0]
    apart = torch.cdist(codes, codes) + torch.eye(6)
    assert float(apart.min()) > 0.1
    assert float(torch.cdist(codes, different[:, 0]).min(dim=1).values.max()) < 1e-4


@pytest.mark.parametrize("width", [1, 4, 64])
def test_different_rows_are_those_of_a_loop_over_pairs(width: int) -> None:
    different = sample(50, 1, width)[:, 0]
    tokens = torch.cat([different[:30], different])
    order = torch.randperm(80, generator=torch.Generator().manual_seed(2))
    seen, expected = [], []
    for row in order.tolist():
        if not any(bool((tokens[row] - tokens[other]).norm() < 1e-6) for other in seen):
            expected.append(row)
        seen.append(row)
    assert len(expected) == 50
    noise = 1e-7 * sample(80, 1, width)[:, 0]  # another layout's rounding
    for at_most in (1, 7, 49, 50, 64, 200):
        assert different_rows(tokens, order, at_most).tolist() == expected[:at_most]
        assert different_rows(tokens + noise, order, at_most).tolist() == expected[:at_most]


@pytest.mark.parametrize("width", [4, 64])
def test_the_limit_is_a_share_of_the_spread(width: int) -> None:
    tokens = 7.0 * sample(40, 1, width)[:, 0] + 100.0
    spread = float((tokens - tokens.mean(dim=0)).norm(dim=1).square().mean().sqrt())
    step = torch.nn.functional.normalize(sample(1, 1, width)[0, 0], dim=0)
    for share, num_different in ((0.4, 40), (2.5, 41)):
        nearby = tokens[:1] + share * SAME_VECTOR * spread * step
        rows = different_rows(torch.cat([tokens, nearby]), torch.arange(41), 41)
        assert len(rows) == num_different


def test_few_different_tokens_among_many_repeat_with_a_small_jitter() -> None:
    tokens = sample(3).repeat(30, 1, 1)
    with pytest.warns(UserWarning, match="9 codes start from 90 vectors of which 3 differ"):
        codes = data_codes(tokens, 9, seed=1)
    for c in range(2):
        apart = torch.cdist(codes[c], codes[c]) + torch.eye(9)
        assert float(apart.min()) > 1e-3
        assert float(torch.cdist(codes[c], tokens[:, c]).min(dim=1).values.max()) < 0.2


def test_fewer_tokens_than_codes_repeat_with_a_small_jitter() -> None:
    tokens = sample(3)
    with pytest.warns(
        UserWarning, match="which 3 differ in the slice with the fewest: the other 6 "
    ):
        codes = data_codes(tokens, 9, seed=1)
    for c in range(2):
        assert codes[c].unique(dim=0).shape[0] == 9
        assert float(torch.cdist(codes[c], tokens[:, c]).min(dim=1).values.max()) < 0.2


def test_kmeans_finds_the_means_of_separated_clusters() -> None:
    centres = 100 * torch.eye(4)[:3]  # three clusters at distance 141, ten tokens each
    tokens = (centres.repeat(10, 1) + sample(30, num_slices=1)[:, 0]).unsqueeze(1)
    # A start with two codes in one cluster can end there, so take one with a code in each.
    seed = next(
        s for s in range(100) if data_codes(tokens, 3, s)[0].argmax(dim=1).unique().numel() == 3
    )
    codes = kmeans_codes(tokens, 3, seed)[0]
    means = torch.stack([tokens[k::3, 0].mean(dim=0) for k in range(3)])
    torch.testing.assert_close(codes[codes.argmax(dim=1).argsort()], means)


def test_kmeans_keeps_the_centre_of_an_empty_cluster() -> None:
    tokens = torch.ones(4, 1, 3)
    codes = kmeans_codes(tokens, 3, seed=0)
    assert torch.isfinite(codes).all()


def test_an_empty_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="empty sample"):
        data_codes(torch.zeros(0, 1, 4), 3, seed=0)
