"""Ranks in messages."""

from __future__ import annotations

import pytest

from vqmoe_megatron.runtime.rank_names import rank_names


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([], "no rank"),
        ([3], "rank 3"),
        ([2, 0, 1], "ranks 0 1 2"),
        ([0, 5, 0], "ranks 0 5"),
        (range(4), "ranks 0-3"),
        ([9, *range(8), 11, 12], "ranks 0-7 9 11 12"),
    ],
)
def test_ranks_are_sorted_unique_and_ranges_from_four_on(ranks, text) -> None:
    assert rank_names(ranks) == text
