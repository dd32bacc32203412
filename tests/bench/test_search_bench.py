"""The search benchmark: rows of all arms, and a search that misses codes is refused."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.bench import search_bench
from vqmoe_megatron.bench.cases import GateFailed
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.search_bench import check_ids, measure_search


@pytest.mark.parametrize("num_codes", [1, 9])
def test_rows(num_codes: int) -> None:
    rows = measure_search(40, 8, num_codes, 3, 0, Progress())
    assert [row["arm"] for row in rows] == ["search", "cdist", "gemm"]
    for row in rows:
        assert (row["num_tokens"], row["width"], row["num_codes"]) == (40, 8, num_codes)
        assert row["gflops_per_second"] == pytest.approx(
            2 * 40 * 8 * num_codes / row["median_ms"] / 1e6
        )


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="width=0"):
        measure_search(40, 0, 9, 3, 0, Progress())


def test_a_wrong_search_is_refused(monkeypatch) -> None:  # noqa: ANN001
    x, codes = torch.randn(30, 4), torch.randn(6, 4)
    check_ids(x, codes)
    right = search_bench.nearest_code(x, codes)
    monkeypatch.setattr(search_bench, "nearest_code", lambda x, codes: (right + 1) % 6)
    with pytest.raises(GateFailed, match="search misses the nearest code of 30 of 30"):
        check_ids(x, codes)


@pytest.mark.parametrize("chosen", [0, 1])
def test_a_tie_may_go_either_way_and_no_other(monkeypatch, chosen: int) -> None:  # noqa: ANN001
    codes = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [9.0, 9.0]])
    x = torch.tensor([[0.0, 0.0], [0.9, 0.0]])  # between the first two; near the first
    monkeypatch.setattr(search_bench, "nearest_code", lambda x, codes: torch.tensor([chosen, 0]))
    check_ids(x, codes)
    monkeypatch.setattr(search_bench, "nearest_code", lambda x, codes: torch.tensor([chosen, 1]))
    with pytest.raises(GateFailed, match="search misses the nearest code of 1 of 2"):
        check_ids(x, codes)
