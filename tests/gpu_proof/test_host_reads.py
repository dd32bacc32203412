"""A step that reads on the host is named with the place that reads; the executions do not."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed


def operations(folder: str, reads: bool) -> dict[str, str]:
    """In a rank: what was seen in a step, by arm."""
    from vqmoe_megatron.bench.cases import LayerCase
    from vqmoe_megatron.bench.shared_inputs import case_inputs
    from vqmoe_megatron.gpu_proof import host_reads
    from vqmoe_megatron.gpu_proof.part import Job
    from vqmoe_megatron.moe.layer import VQMoELayer

    evaluate = VQMoELayer._evaluate

    def reading(layer: VQMoELayer, hidden_states):  # noqa: ANN001, ANN202
        output = evaluate(layer, hidden_states)
        if reads:
            output.sum().item()
        return output

    job = Job("correctness", "cpu", True, 100.0, Path(folder), Path(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VQMoELayer, "_evaluate", reading)
        host_reads.check_host_reads(job, case_inputs(LayerCase(8, 24, 48, 32, 48)))
    assert not job.findings.checks  # these are of CUDA
    return {row["arm"]: row["operations"] for row in job.findings.tables["Host reads of a step"]}


def test_no_execution_reads_on_the_host(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(operations, str(tmp_path), False)
    assert len(found) == 9 and set(found.values()) == {"none"}, found


def test_a_read_is_named_with_its_place(ranks, tmp_path: Path) -> None:  # noqa: ANN001
    (found,) = ranks(1).run(operations, str(tmp_path), True)
    assert all("item at" in text and ":reading" in text for text in found.values()), found
