"""The router's gating works without Transformer Engine, on a GPU too; what is defined stays."""

from __future__ import annotations

import subprocess
import sys

import pytest
from megatron.core.transformer.moe import moe_utils

from vqmoe_megatron.runtime.cpu_compat.missing_names import name_missing_functions


def test_a_missing_name_is_there_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(moe_utils, "te_general_gemm", raising=False)
    name_missing_functions()
    assert moe_utils.te_general_gemm is None


def test_a_defined_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    own = object()
    monkeypatch.setattr(moe_utils, "te_general_gemm", own, raising=False)
    name_missing_functions()
    assert moe_utils.te_general_gemm is own


def test_the_gating_runs_without_the_adaptations_to_a_cpu() -> None:
    """As on a GPU without Transformer Engine: nobody but the layer names it."""
    program = (
        "import torch\n"
        "from megatron.core.transformer.moe.moe_utils import router_gating_linear\n"
        "from vqmoe_megatron.runtime.cpu_compat.missing_names import name_missing_functions\n"
        "x, weight = torch.ones(2, 4, requires_grad=True), torch.ones(3, 4)\n"
        "try:\n"
        "    router_gating_linear(x, weight, None, torch.float32)\n"
        "except NameError as error:\n"
        "    print(error)\n"
        "name_missing_functions()\n"
        "router_gating_linear(x, weight, None, torch.float32).sum().backward()\n"
        "print(x.grad.sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True)
    assert done.stdout.decode().splitlines()[-1] == "24.0", done.stderr.decode()[-2000:]
