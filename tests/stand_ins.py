"""Stand-ins for Apex's and Transformer Engine's kernels, and programs that run beside them.

The real packages need CUDA to be built, installed or imported, so they cannot exist where these
tests run. A stand-in is a real importable package of the same names in plain torch, written to a
folder. It proves what this package chooses, calls and says; never that NVIDIA's kernels are right
or fast. Programs run in a process of their own, since Megatron looks once, at its import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
APEX = {
    "apex/__init__.py": "",
    "amp_C.py": "def multi_tensor_adam(): ...\n",
    "apex/optimizers/__init__.py": '''
import amp_C, torch

class FusedSGD: ...

class FusedAdam(torch.optim.Optimizer):
    """Apex's arguments and bookkeeping: the step is counted in the groups."""
    num_steps = 0

    def __init__(self, params, lr, weight_decay, betas, eps, adam_w_mode):
        amp_C.multi_tensor_adam
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        FusedAdam.num_steps += 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (b1, b2), t = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                denominator = (v / (1 - b2**t)).sqrt() + group["eps"]
                p.addcdiv_(m, denominator, value=-group["lr"] / (1 - b1**t))
''',
    "fused_layer_norm_cuda.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
import torch

class FusedLayerNormAffineFunction:
    num_calls = 0

    @staticmethod
    def forward(ctx, input, weight, bias, normalized_shape, eps): ...

    @classmethod
    def apply(cls, input, weight, bias, normalized_shape, eps):
        cls.num_calls += 1
        return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
""",
    "fused_weight_gradient_mlp_cuda.py": """
num_calls = 0

def wgrad_gemm_accum_fp32(total_input, grad_output, main_grad):
    global num_calls
    num_calls += 1
    main_grad.add_(grad_output.float().t() @ total_input.float())
""",
}


def write(folder: Path, files: Mapping[str, str]) -> Path:
    """Write a stand-in's files below ``folder``, the import path they stand on."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def run_beside(folder: Path | None, program: str, *arguments: Any) -> Any:
    """Run ``program`` with ``folder`` at the front of its import path.

    It finds ``arguments`` in ``given``, and what it puts into ``found`` is returned.
    """
    done = start_beside(folder, "-c", f"{PROLOGUE}\n{program}\n{EPILOGUE}", json.dumps(arguments))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def start_beside(folder: Path | None, *words: str) -> subprocess.CompletedProcess:
    """Run Python with ``words`` and ``folder`` at the front of its import path."""
    paths = [str(folder)] if folder else []
    paths += [str(ROOT), str(ROOT / "tests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=240,
    )


PROLOGUE = """
import json, sys
given, found = json.loads(sys.argv[1]), None
"""
EPILOGUE = """
print("\\n" + json.dumps(found))
"""
