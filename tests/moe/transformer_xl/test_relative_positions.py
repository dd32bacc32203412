"""The shift against an index, distances against the formula."""

from __future__ import annotations

import pytest
import torch
from plain_transformer_xl import distance_vector

from vqmoe_megatron.moe.transformer_xl.relative_positions import by_key, distance_vectors


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (2, 3), (4, 4), (3, 11), (1, 6)])
def test_scores_by_distance_go_to_their_keys(num_queries: int, num_keys: int) -> None:
    scores = torch.randn(2, 3, num_queries, num_keys)
    found = by_key(scores)
    for i in range(num_queries):
        for j in range(num_keys - num_queries + i + 1):
            distance = num_keys - num_queries + i - j
            assert torch.equal(found[..., i, j], scores[..., i, num_keys - 1 - distance])


def test_vectors_of_distances() -> None:
    found = distance_vectors(9, 6, torch.zeros(1, dtype=torch.float64))
    wanted = torch.stack([distance_vector(8 - row, 6) for row in range(9)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    half = distance_vectors(5000, 6, torch.zeros(1))
    torch.testing.assert_close(half[0].double(), distance_vector(4999, 6), rtol=0, atol=1e-7)
