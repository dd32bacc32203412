"""The dispatch benchmark, in a rank: both ways sort the same rows, or nothing is timed."""

from __future__ import annotations

import pytest
import torch

from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.progress import Progress

pytestmark = pytest.mark.distributed


def measure(routing: str) -> list[dict]:
    from vqmoe_megatron.bench.dispatch_bench import measure_dispatch

    return measure_dispatch(LayerCase(8, 8, 60, 32, 32, routing), 3, 0, Progress())


@pytest.mark.parametrize("routing", ["balanced", "one-hot"])
def test_rows(ranks, routing: str) -> None:  # noqa: ANN001
    (rows,) = ranks(1).run(measure, routing)
    assert [row["arm"] for row in rows] == ["A", "A-plan", "C", "C-plan"]
    assert all(0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"] for row in rows)
    assert {(row["num_experts"], row["routing"]) for row in rows} == {(8, routing)}


def disagree(what: str) -> str:
    """In a rank: show the check two ways that differ."""
    from vqmoe_megatron.bench.cases import GateFailed
    from vqmoe_megatron.bench.dispatch_bench import _check

    rows, counts = torch.arange(6.0).view(3, 2), torch.tensor([2, 1])
    other = (rows.flip(0), counts) if what == "order" else (rows, counts.flip(0))
    try:
        _check({"A": lambda: (rows, counts), "C": lambda: other})
    except GateFailed as failure:
        return str(failure)
    return ""


def test_differing_ways_are_refused(ranks) -> None:  # noqa: ANN001
    assert "sort the rows differently" in ranks(1).run(disagree, "order")[0]
    assert "different numbers of rows" in ranks(1).run(disagree, "counts")[0]
