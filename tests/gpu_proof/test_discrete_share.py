"""The share is that of the times beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


def measured(folder: str) -> tuple[list[dict], dict]:
    """In a rank."""
    import torch

    from vqmoe_megatron.gpu_proof.discrete_share import measure_discrete_share
    from vqmoe_megatron.gpu_proof.part import Job

    job = Job("kernels", "cpu", True, 100.0, Path(folder), Path(folder))
    with torch.no_grad():  # as the part
        measure_discrete_share(job, 3)
    return job.findings.checks, job.findings.tables


def test_search_read_and_combine_over_the_layer(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    ((checks, tables),) = ranks(1).run(measured, str(tmp_path))
    ((row,),) = tables.values()
    parts = [row[name] for name in ("search_ms", "forward_ms", "backward_ms")]
    assert min(parts) > 0
    assert row["share"] == pytest.approx(sum(parts) / row["top1_layer_ms"])
    assert checks == []  # a CPU's share is no promise
