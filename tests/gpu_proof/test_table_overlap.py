"""Layers with their table ahead equal the layers; a table of something else is a failed check."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


def checked(folder: str, is_stale: bool, timed: bool) -> tuple[list[dict], dict]:
    """In a rank: checks and tables of the tiny case; stale: the first table is read for ever."""
    from vqmoe_megatron.bench.cases import LayerCase
    from vqmoe_megatron.bench.gate import output_gradient
    from vqmoe_megatron.bench.shared_inputs import case_inputs
    from vqmoe_megatron.gpu_proof import table_overlap
    from vqmoe_megatron.gpu_proof.part import Job
    from vqmoe_megatron.moe.executions.table_ahead import TableAhead

    start = TableAhead.start

    def started(execution: TableAhead, dtype) -> None:  # noqa: ANN001
        start(execution, dtype)
        if is_stale:
            execution._table.values.data.mul_(1.01)

    job = Job("layer", "cpu", True, 100.0, Path(folder), Path(folder))
    inputs = case_inputs(LayerCase(4, 10, 24, 32, 48, norm="separate"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableAhead, "start", started)
        if timed:
            table_overlap.time_overlap(job, inputs, output_gradient(inputs, 1), 3, 0)
        else:
            table_overlap.check_overlap(job, inputs)
    return job.findings.checks, job.findings.tables


def test_tables_ahead_are_the_tables(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    ((checks, _),) = ranks(1).run(checked, str(tmp_path), False, False)
    assert len(checks) == 5 and all(check["passed"] for check in checks), checks


def test_another_table_is_seen(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    ((checks, _),) = ranks(1).run(checked, str(tmp_path), True, False)
    assert len(checks) == 5 and not any(check["passed"] for check in checks)


def test_both_ways_are_timed_behind_attention(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    ((checks, tables),) = ranks(1).run(checked, str(tmp_path), False, True)
    assert checks == []
    (rows,) = tables.values()
    assert [row["arm"] for row in rows] == ["E", "E2"]
    assert all(row["attention_ms"] > 0 for row in rows)
