"""The CPU layer: nothing on import, everything on install, a refusal beside CUDA.

Each test runs a script in a fresh process, because what is tested is what a process looks like.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SNAPSHOT = """
import importlib, pkgutil, sys, types
import torch

def snapshot():
    '''(owner, name) -> identity, of everything callable or constant that could be patched.'''
    owners = [torch, torch.cuda, torch.cuda.nvtx, torch.Tensor, torch.nn.Module, torch.distributed,
              torch.nn.functional, torch.autograd, torch.random]
    owners += [m for n, m in sorted(sys.modules.items()) if n.startswith('megatron.core')]
    owners += [v for m in owners[9:] for v in vars(m).values()
               if isinstance(v, type) and v.__module__.startswith('megatron.core')]
    return {(str(getattr(o, '__module__', '')), o.__name__, n): v
            for o in owners if hasattr(o, '__name__')
            for n, v in vars(o).items()
            if not n.startswith('__') and not isinstance(v, (types.ModuleType, dict, list, set))}

def changed(before, after):
    return sorted(str(key) for key, value in before.items()
                  if key in after and after[key] is not value)
"""


def run(script: str) -> str:
    """Run in a fresh process without CUDA; return what it printed."""
    finished = subprocess.run(
        [sys.executable, "-c", SNAPSHOT + script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.strip()


def test_importing_every_module_patches_nothing() -> None:
    script = """
import vqmoe_megatron
# Megatron imported first, by itself, so that its own import-time changes are not counted as ours.
import megatron.core.models.gpt, megatron.core.dist_checkpointing, megatron.core.optimizer
import megatron.core.pipeline_parallel.schedules, megatron.core.distributed
before = snapshot()
names = [m.name for m in pkgutil.walk_packages(vqmoe_megatron.__path__, 'vqmoe_megatron.')
         if not m.name.startswith('vqmoe_megatron.cli')]
for name in names:
    importlib.import_module(name)
assert 'vqmoe_megatron.moe.layer' in sys.modules and len(names) > 30, names
after = snapshot()
assert len(before) > 2000, len(before)
print(changed(before, after))
"""
    assert run(script) == "[]"


@pytest.mark.full
def test_the_snapshot_sees_the_installed_layer() -> None:
    """The test above could not fail if the snapshot were blind."""
    script = """
import os
from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat
os.environ['TORCHDYNAMO_DISABLE'] = '1'  # allows Megatron first
import megatron.core.transformer.moe.token_dispatcher
before = snapshot()
install_cpu_compat()
print(len(changed(before, snapshot())))
"""
    assert int(run(script)) > 40


@pytest.mark.full
def test_beside_cuda_it_refuses_and_patches_nothing() -> None:
    script = """
import os
from vqmoe_megatron.runtime import cpu_compat
import megatron.core.transformer.moe.token_dispatcher
torch.cuda.is_available = lambda: True
before, environment = snapshot(), dict(os.environ)
try:
    cpu_compat.install_cpu_compat()
except ValueError as error:
    print('CUDA is available here' in str(error))
print(changed(before, snapshot()), os.environ == environment, cpu_compat.is_installed())
"""
    assert run(script).splitlines() == ["True", "[] True False"]


@pytest.mark.parametrize("first", ["megatron.core.fusions.fused_bias_gelu", "torch"])
def test_megatrons_fused_functions_are_not_compiled_even_if_imported_before(first: str) -> None:
    script = f"""
import os
os.environ.pop('TORCHDYNAMO_DISABLE', None)
import {first}
from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat
install_cpu_compat()
from megatron.core.fusions.fused_bias_gelu import bias_gelu
torch._dynamo.utils.counters.clear()
y = bias_gelu(torch.zeros(4), torch.ones(4, requires_grad=True))
y.sum().backward()
print(float(y.detach().sum()) > 0, dict(torch._dynamo.utils.counters['frames']))
"""
    assert run(script) == "True {}"


INSTALLED = """
from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat, is_installed
install_cpu_compat()
"""


def test_placement_generators_streams_and_types_after_install() -> None:
    script = (
        INSTALLED
        + """
first = snapshot()
install_cpu_compat()  # twice is once
assert changed(first, snapshot()) == [] and is_installed()

cuda = torch.device('cuda', 0)
for made in (torch.empty(2, device='cuda'), torch.zeros(2, device=cuda), torch.randn(2,
             device='cuda:0'), torch.tensor([1.0], device='cuda'), torch.arange(3, device='cuda',
             pin_memory=True), torch.zeros_like(torch.ones(2), device='cuda'),
             torch.ones(2).new_empty(3, device='cuda'), torch.ones(2).to('cuda'),
             torch.ones(2).to(cuda, torch.float64), torch.ones(2).cuda(), torch.nn.Linear(2,
             2).cuda().weight, torch.nn.Linear(2, 2).to('cuda').weight, torch.ones(2).pin_memory(),
             torch.zeros(1, device=torch.cuda.current_device())):
    assert made.device.type == 'cpu', made
assert torch.ones(2).to(cuda, torch.float64).dtype == torch.float64
assert torch.zeros(2, device='meta').device.type == 'meta'  # other devices are left alone

assert torch.ones(1).type() == 'torch.cuda.FloatTensor'
assert torch.ones(1).bfloat16().type() == 'torch.cuda.BFloat16Tensor'
assert torch.ones(1).type('torch.cuda.DoubleTensor').dtype == torch.float64
assert torch.ones(1).type(torch.int64).dtype == torch.int64

torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), first)
torch.manual_seed(5)
assert torch.equal(torch.rand(3), first)

stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    event = stream.record_event()
event.synchronize()
event.wait()
assert event.query() and event.elapsed_time(torch.cuda.Event()) == 0.0
given = torch.cuda.Event()
assert torch.cuda.current_stream().record_event(given) is given
torch.cuda.synchronize()
assert torch.cuda.device_count() == 1 and torch.cuda.max_memory_allocated() == 0
print('ok')
"""
    )
    assert run(script) == "ok"


def test_megatrons_dispatcher_helpers_after_install() -> None:
    script = (
        INSTALLED
        + """
from megatron.core.transformer.moe import moe_utils, token_dispatcher
splits = token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([1, 2]), as_numpy=True)
assert splits.tolist() == [1, 2] and type(splits).__module__ == 'numpy'
assert moe_utils.te_general_gemm is None or callable(moe_utils.te_general_gemm)
x, w = torch.randn(3, 1, 4), torch.randn(2, 4)
logits = moe_utils.router_gating_linear(x, w, None, torch.float32)
assert torch.allclose(logits, x @ w.t(), atol=1e-6)
print('ok')
"""
    )
    assert run(script) == "ok"


@pytest.mark.full
@pytest.mark.parametrize("variable", ["TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"])
def test_environment_is_set_by_install_and_not_by_import(variable: str) -> None:
    script = f"""
import os
os.environ.pop({variable!r}, None)
import vqmoe_megatron.runtime.cpu_compat as compat
before = {variable!r} in os.environ
compat.install_cpu_compat()
print(before, os.environ[{variable!r}])
"""
    assert run(script) == "False 1"


def test_meta_takes_the_cpus_part_for_a_while() -> None:
    script = """
from vqmoe_megatron.runtime.cpu_compat import in_place_of_cuda, install_cpu_compat

def places():
    number = torch.ones(2, pin_memory=True)
    return [str(t.device) for t in (
        torch.zeros(2, device='cuda'), torch.zeros(2, device=torch.cuda.current_device()),
        torch.zeros(2).cuda(), torch.zeros(2).to('cuda'), torch.tensor(1, device='cuda'),
        torch.nn.Linear(1, 1).cuda().weight, torch.zeros(2),
    )] + [number.is_pinned(), number[1:].is_pinned(), torch.ones(2).is_pinned(),
          torch.ones(2).pin_memory().is_pinned(), torch.zeros(1, device='cuda').type()]

for device in ('cpu', 'tpu'):
    try:
        in_place_of_cuda(device).__enter__()
    except ValueError as error:
        print(error)
install_cpu_compat()
with in_place_of_cuda('meta'):
    inside = places()
print(inside)
print(places())
"""
    refused = "in_place_of_cuda needs install_cpu_compat(), which redirects CUDA calls"
    unknown = "device='tpu' cannot stand in for cuda: choose one of cpu, meta"
    inside = ["meta"] * 6 + ["cpu", True, True, False, True, "torch.cuda.FloatTensor"]
    outside = ["cpu"] * 7 + [False] * 4 + ["torch.cuda.FloatTensor"]
    assert run(script).splitlines() == [refused, unknown, str(inside), str(outside)]
