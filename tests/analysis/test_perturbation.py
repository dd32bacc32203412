"""Disturbances have the size that was asked for; areas are those of simple curves."""

from __future__ import annotations

import math

import pytest
import torch

from vqmoe_megatron.analysis.perturbation import (
    add_noise,
    added_loss,
    area_under_curve,
    corrupt_tokens,
    reduction,
)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_so_many_tokens_become_others(rate: float) -> None:
    tokens = torch.randint(0, 50, (20, 500), generator=generator())
    found = corrupt_tokens(tokens, rate, 50, generator())
    assert float((found != tokens).float().mean()) == pytest.approx(rate, abs=0.02)
    assert 0 <= int(found.min()) and int(found.max()) < 50


def test_noise_has_the_relative_length() -> None:
    embedding = torch.randn(400, 64, generator=generator()) * torch.rand(400, 1)
    moved = add_noise(embedding, 0.5, generator()) - embedding
    ratio = moved.norm(dim=1) / embedding.norm(dim=1)
    assert float(ratio.mean()) == pytest.approx(0.5, abs=0.01)
    assert add_noise(embedding, 0.0, generator()).equal(embedding)


def test_areas() -> None:
    assert area_under_curve([0.0, 0.1, 0.4], [2.0, 2.0, 2.0]) == pytest.approx(2.0)
    assert area_under_curve([0.0, 1.0, 3.0], [0.0, 1.0, 3.0]) == pytest.approx(1.5)
    assert added_loss([0.0, 1.0], [2.0, 4.0]) == pytest.approx(1.0)
    assert reduction(0.72, 1.0) == pytest.approx(0.28)
    assert math.isnan(reduction(0.5, 0.0))


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="no share"):
        corrupt_tokens(torch.zeros(1, 1, dtype=torch.int64), 1.5, 8, generator())
    with pytest.raises(ValueError, match="negative"):
        add_noise(torch.ones(2), -1.0, generator())
    with pytest.raises(ValueError, match="do not rise"):
        area_under_curve([0.0, 0.2, 0.2], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="no curve"):
        area_under_curve([0.0], [1.0])
