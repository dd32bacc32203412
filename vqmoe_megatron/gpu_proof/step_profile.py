"""Where the device's time in a training step goes, by torch's profiler, in this process.

Kernels are told apart by their names; on the CPU the operations of torch are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.runtime.world import (
    RankVariables,
    build_process_groups,
    choose_device,
    join_world,
    leave_world,
)
from vqmoe_megatron.train.preflight import check_run
from vqmoe_megatron.train.run_report import RunReport
from vqmoe_megatron.train.stop_requests import StopRequests

NUM_SKIPPED, NUM_WARMUP, NUM_PROFILED = 3, 1, 3  # steps
NUM_SHOWN = 15
KINDS = (  # the first that matches
    ("search", r"nearest|search"),
    ("combine", r"^_forward_kernel|^_backward_kernel"),
    ("grouped products", r"[Gg]rouped?_?(mm|gemm)|GroupProblemShape"),
    ("attention", r"flash|fmha|softmax|attention"),
    ("collectives", r"nccl|c10d|gloo"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|aten::(mm|bmm|addmm|baddbmm)"),
    ("optimizer", r"multi_tensor|[Aa]dam|foreach"),
    ("sort and scan", r"[Ss]ort|[Rr]adix|[Ss]can|cumsum"),
    ("sums by id", r"embedding|index_add|scatter"),
    ("copies", r"[Mm]emcpy|[Mm]emset|copy|fill|zero_"),
    ("gathers", r"gather|index"),
    ("reductions", r"reduce|norm|sum|mean"),
    ("elementwise", r"elementwise|vectorized|aten::(add|sub|mul|div|silu|gelu|where|sqrt|exp)"),
)


@dataclass(frozen=True)
class Shares:
    """Rows: ``kinds`` with their share of all time, ``kernels`` the longest ones."""

    device_ms_per_step: float
    kinds: list[dict[str, Any]]
    kernels: list[dict[str, Any]]


class _Profiled(RunReport):
    """Moves the profiler on at every logged step."""

    def __init__(self, profiler: torch.profiler.profile) -> None:
        self.profiler = profiler

    def log(self, record: Mapping[str, float]) -> None:
        """At ``train.log_interval=1``: after each step."""
        self.profiler.step()


def profile_steps(recipe: Path, overrides: list[str]) -> Shares:
    """Train a run on one rank of this process and profile some of its steps.

    ``overrides`` must log every step and take 7 or more. Joins and leaves a world of one rank.
    """
    config = load_recipe(recipe, overrides)
    device, _ = choose_device(config.train.device)
    if device == "cpu":
        from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat

        install_cpu_compat()
    from vqmoe_megatron.train.trainer import Trainer

    join_world(RankVariables(0, 1, 0, "profile"), device)
    run = check_run(config, 1, device)
    build_process_groups(run.layout)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(
            wait=NUM_SKIPPED, warmup=NUM_WARMUP, active=NUM_PROFILED, repeat=1
        ),
        acc_events=True,
    )
    with profiler:
        Trainer(run, StopRequests({})).train(_Profiled(profiler))
    leave_world()
    return _shares(profiler.key_averages(), device)


def _shares(events: Any, device: str) -> Shares:
    times_ms: dict[str, float] = {}
    counts: dict[str, int] = {}
    for event in events:
        is_kernel = event.device_type == DeviceType.CUDA
        if is_kernel != (device == "cuda") or event.key.startswith("ProfilerStep"):
            continue
        microseconds = event.self_device_time_total if is_kernel else event.self_cpu_time_total
        times_ms[event.key] = times_ms.get(event.key, 0.0) + microseconds / 1e3 / NUM_PROFILED
        counts[event.key] = counts.get(event.key, 0) + event.count
    total = sum(times_ms.values())
    if not total:
        return Shares(0.0, [], [])
    kinds: dict[str, float] = {}
    for name, time_ms in times_ms.items():
        kind = kind_of(name)
        kinds[kind] = kinds.get(kind, 0.0) + time_ms
    longest = sorted(times_ms, key=times_ms.__getitem__, reverse=True)[:NUM_SHOWN]
    return Shares(
        device_ms_per_step=total,
        kinds=[
            {"kind": kind, "ms_per_step": kinds[kind], "share": kinds[kind] / total}
            for kind in sorted(kinds, key=kinds.__getitem__, reverse=True)
        ],
        kernels=[
            {
                "kernel": name[:120],
                "kind": kind_of(name),
                "calls_per_step": counts[name] / NUM_PROFILED,
                "ms_per_step": times_ms[name],
                "share": times_ms[name] / total,
            }
            for name in longest
        ],
    )


def kind_of(name: str) -> str:
    """Return what a kernel or operation of this name does."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")
