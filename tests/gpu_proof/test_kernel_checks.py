"""The checks of kernels see a kernel that is wrong, and one that raises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vqmoe_megatron.gpu_proof import kernel_checks
from vqmoe_megatron.gpu_proof.kernel_arms import FP32, SearchArm
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.vq.search import nearest_code


def searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run) -> dict[str, bool]:  # noqa: ANN001
    monkeypatch.setattr(kernel_checks, "SEARCH_ARMS", {"it": SearchArm(run, FP32, is_ours=True)})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    job = Job("correctness", "cpu", True, 100.0, tmp_path, tmp_path)
    kernel_checks._check_searches(job, has_kernels=False)
    return {check["name"]: check["passed"] for check in job.findings.checks}


def test_a_right_search_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = searched(tmp_path, monkeypatch, nearest_code)
    assert len(found) == 8 and all(found.values())


def test_a_search_in_bf16_merges_close_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rough(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        return nearest_code(x.bfloat16(), (codes + 300.0).bfloat16() - 300.0)

    assert not all(searched(tmp_path, monkeypatch, rough).values())


def test_a_search_that_raises_fails_its_own_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    found = searched(tmp_path, monkeypatch, broken)
    assert len(found) == 4 and not any(found.values())
