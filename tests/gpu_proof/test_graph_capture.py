"""Captured layers equal layers without graphs; one not captured, or wrong, is a failed check."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqmoe_megatron.runtime.recorded_graph import RecordedGraph

pytestmark = pytest.mark.distributed


class FailingGraph(RecordedGraph):
    """As CUDA does with an operation that it cannot capture."""

    def capture(self, work):  # noqa: ANN001, ANN201
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class StaleGraph(RecordedGraph):
    """Its replays do nothing, as those of a graph whose inputs lie elsewhere."""

    def capture(self, work):  # noqa: ANN001, ANN201
        super().capture(work)
        return lambda: None


def checked(folder: str, graph: str, timed: bool) -> tuple[list[dict], dict]:
    """In a rank: checks and tables of the tiny case."""
    from vqmoe_megatron.bench.cases import LayerCase
    from vqmoe_megatron.bench.gate import output_gradient
    from vqmoe_megatron.bench.shared_inputs import case_inputs
    from vqmoe_megatron.gpu_proof import graph_capture
    from vqmoe_megatron.gpu_proof.part import Job

    job = Job("layer", "cpu", True, 100.0, Path(folder), Path(folder))
    inputs = case_inputs(LayerCase(4, 10, 24, 32, 48, norm="separate"))
    kinds = {"recorded": RecordedGraph, "failing": FailingGraph, "stale": StaleGraph}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_capture, "graph_type", lambda device: kinds[graph])
        if timed:
            graph_capture.time_captured(job, inputs, output_gradient(inputs, 1), 3, 0)
        else:
            graph_capture.check_captured(job, inputs)
    return job.findings.checks, job.findings.tables


def test_captured_layers_equal_the_layers(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    ((checks, _),) = ranks(1).run(checked, str(tmp_path), "recorded", False)
    assert len(checks) == 5 and all(check["passed"] for check in checks), checks
    for check in checks:
        assert int(check["text"].split()[2]) >= 4 * 5  # output, tokens, experts, norms


def test_a_replay_of_something_else_is_seen(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    ((checks, _),) = ranks(1).run(checked, str(tmp_path), "stale", False)
    assert len(checks) == 5 and not any(check["passed"] for check in checks)


@pytest.mark.parametrize("timed", [False, True])
def test_a_capture_that_fails_is_a_failed_check(ranks, tmp_path: Path, timed: bool) -> None:  # noqa: ANN001
    ((checks, tables),) = ranks(1).run(checked, str(tmp_path), "failing", timed)
    assert len(checks) == 5 and not any(check["passed"] for check in checks)
    assert all("operation not permitted" in check["text"] for check in checks)
    assert tables == {}


def test_a_captured_step_is_timed(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    ((checks, tables),) = ranks(1).run(checked, str(tmp_path), "recorded", True)
    assert all(check["passed"] for check in checks)
    (rows,) = tables.values()
    assert [row["arm"] for row in rows] == ["E", "F", "F2", "E2", "F3"]
    assert all(row["captured_ms"] > 0 and row["plain_ms"] > 0 for row in rows)
