"""Decayed means by doubling are those of a loop, but for terms that weigh next to nothing."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.vq.context_means import LEAST_WEIGHT, context_means, num_doublings
from vqmoe_megatron.vq.memory_oracle import oracle_context_means
from vqmoe_megatron.vq.row_addresses import tokens_before


@pytest.mark.parametrize("decay", [0.0, 1e-5, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("length", [1, 2, 7, 70])
def test_equals_the_loop(decay: float, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    vectors = torch.randn(2, length, 3, generator=generator, dtype=torch.float64)
    starts = torch.rand(2, length, generator=generator) < 0.1
    found = context_means(vectors, tokens_before(starts), decay)
    expected = torch.stack(
        [
            oracle_context_means(of_sequence, first.tolist(), decay)
            for of_sequence, first in zip(vectors, starts, strict=True)
        ]
    )
    # What is left out weighs decay^n / (1 - decay) at most, n = 2^doublings terms in.
    left_out = decay ** (2 ** num_doublings(decay))
    assert left_out <= LEAST_WEIGHT
    tolerance = 1e-12 if length <= 2 ** num_doublings(decay) else 10 * left_out
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance + 1e-14)


def test_a_document_is_read_as_if_it_stood_alone() -> None:
    vectors = torch.randn(1, 9, 4, dtype=torch.float64)
    starts = torch.zeros(1, 9, dtype=torch.bool)
    starts[0, 4] = True
    whole = context_means(vectors, tokens_before(starts), 0.8)
    alone = context_means(vectors[:, 4:], tokens_before(starts[:, 4:]), 0.8)
    assert torch.equal(whole[:, 4:], alone)
    vectors[:, 6] += 1.0
    changed = context_means(vectors, tokens_before(starts), 0.8)
    assert torch.equal(changed[:, :6], whole[:, :6])  # causal
    assert not torch.equal(changed[:, 8], whole[:, 8])


@pytest.mark.parametrize(
    ("decay", "doublings"), [(0.0, 0), (1e-4, 0), (0.5, 4), (0.7, 5), (0.999, 14)]
)
def test_the_number_of_doublings(decay: float, doublings: int) -> None:
    assert num_doublings(decay) == doublings
