"""The checks of kernels see a kernel that is wrong, and one that raises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vqmoe_megatron.gpu_proof import kernel_checks
from vqmoe_megatron.gpu_proof.kernel_arms import EXACT, FP32, SPLIT, SearchArm
from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.gpu_proof.search_cases import CASES
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


@pytest.mark.parametrize("is_right", [True, False])
def test_the_split_search_is_held_against_the_fp32_kernel_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_right: bool
) -> None:
    def split(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        ids = nearest_code(x, codes)
        if not is_right:
            ids[3] = (ids[3] + 1) % len(codes)
        return ids

    arms = {EXACT: SearchArm(nearest_code, FP32), SPLIT: SearchArm(split, FP32)}
    monkeypatch.setattr(kernel_checks, "SEARCH_ARMS", arms)
    monkeypatch.setattr(kernel_checks, "share_undecided", lambda x, codes: 0.5)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("cpu"))
    job = Job("correctness", "cpu", True, 100.0, tmp_path, tmp_path)
    kernel_checks.check_hard_searches(job)
    checks = job.findings.checks
    assert len(checks) == 2 * len(CASES)
    assert [check["passed"] for check in checks] == [is_right] * len(checks)
    assert all("50.00% undecided" in check["text"] for check in checks)
