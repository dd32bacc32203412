"""Kernels or plain torch: what keeps a tensor from a kernel is named, and the CPU stays silent."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from vqmoe_megatron.vq import kernel_choice
from vqmoe_megatron.vq.kernel_choice import kernel_obstacle, use_kernel


def test_the_cpu_path_is_taken_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not use_kernel(torch.zeros(2), None)
        assert not use_kernel(torch.zeros(2, dtype=torch.float64))


def test_float64_is_an_obstacle() -> None:
    assert "float64" in kernel_obstacle([torch.float32, torch.float64])


def test_with_triton_nothing_keeps_the_other_dtypes_away() -> None:
    pytest.importorskip("triton")
    assert kernel_obstacle([torch.float32, torch.bfloat16, torch.int64]) is None


def test_a_missing_triton_is_an_obstacle_with_its_reason() -> None:
    program = (
        "import sys; sys.modules['triton'] = None\n"  # what Python itself does to forbid an import
        "import torch\n"
        "from vqmoe_megatron.vq.kernel_choice import kernel_obstacle\n"
        "print(kernel_obstacle([torch.float32]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.startswith("triton cannot be imported (")
    assert "triton" in result.stdout.split("(", 1)[1]


def test_a_triton_that_cannot_compile_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")

    class Active:
        @property
        def active(self) -> None:
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton.runtime, "driver", Active())
    kernel_choice._triton_obstacle.cache_clear()
    try:
        obstacle = kernel_obstacle([torch.float32])
    finally:
        kernel_choice._triton_obstacle.cache_clear()
    assert "Failed to find C compiler" in obstacle and "python3-dev" in obstacle


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_cuda_a_reason_is_given_once() -> None:
    tensor = torch.zeros(2, dtype=torch.float64, device="cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not use_kernel(tensor)
        assert not use_kernel(tensor)
    assert len(caught) <= 1  # none when an earlier test already heard it
    assert all("float64" in str(warning.message) for warning in caught)
