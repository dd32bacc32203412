"""What is done around a capture: with a graph that runs its step at once, and with one that fails.

No CPU has CUDA graphs; torch's part of it is all that is put in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

pytestmark = pytest.mark.distributed


class EagerGraph:
    """Its capture is the step itself, so that a replay has nothing left to do."""

    num_replays = 0

    def replay(self) -> None:
        EagerGraph.num_replays += 1


def rows(fails: bool) -> list[dict]:
    """In a rank."""
    from vqmoe_megatron.bench.cases import LayerCase
    from vqmoe_megatron.bench.gate import output_gradient
    from vqmoe_megatron.bench.shared_inputs import case_inputs
    from vqmoe_megatron.gpu_proof import graph_capture

    @contextmanager
    def captured(graph: EagerGraph) -> Iterator[None]:
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    inputs = case_inputs(LayerCase(4, 10, 24, 32, 48, norm="separate"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", EagerGraph)
        patch.setattr(torch.cuda, "graph", captured)
        patch.setattr(graph_capture, "has_graphs", lambda: True)
        return list(graph_capture.capture_rows(inputs, output_gradient(inputs, 1), 3, 0))


def test_a_captured_step_is_compared_and_timed(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(rows, False)
    assert [row["arm"] for row in found] == ["E", "F", "F2", "G1"]
    for row in found:
        assert row["outcome"] == "captured"
        assert row["difference_from_eager"] < 1e-5
        assert row["eager_ms"] > 0 and row["replayed_ms"] >= 0
        assert row["num_compared"] >= 5  # output, tokens, experts, norms


def test_a_capture_that_fails_says_why(ranks) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(rows, True)
    for row in found:
        assert row["outcome"].startswith("not captured: RuntimeError: operation not permitted")
        assert "more" not in row["outcome"] and "eager_ms" not in row
