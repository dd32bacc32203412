"""What a rank of ``gloo_ranks`` runs. Imported once, by the process that ranks are forked from."""

from __future__ import annotations

import gc
import importlib.util
import random
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed import distributed_c10d

from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat

install_cpu_compat()

# ruff: noqa: E402
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

import vqmoe_megatron.train.trainer  # noqa: F401  what most jobs import
from vqmoe_megatron.config import ParallelConfig, RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.runtime.versions import forget_moe_log
from vqmoe_megatron.runtime.world import build_process_groups, discover_rank, join_world


def serve(folder: Path, jobs: Connection) -> None:
    """Join the world, then run one job per number that comes, until no more can come."""
    variables = discover_rank()
    join_world(variables, "cpu")
    current_layout = None
    loaded: dict[str, Any] = {}
    while (number := _next(jobs)) is not None:
        job = torch.load(folder / f"job_{number}.pt", weights_only=True)
        print(f"job {number}: {job['function']} {job['layout']}")
        if job["layout"] != current_layout:
            _build_groups(job["layout"])
            current_layout = job["layout"]
        _seed(job["seed"])
        if job["file"] not in loaded:
            loaded[job["file"]] = _load_file(job["file"])
        result = getattr(loaded[job["file"]], job["function"])(*job["args"])
        unfinished = folder / f"unfinished_{variables.rank}.pt"
        torch.save(result, unfinished)
        unfinished.rename(folder / f"result_{number}_{variables.rank}.pt")


def _next(jobs: Connection) -> int | None:
    try:
        return jobs.recv()
    except EOFError:
        return None


def _build_groups(sizes: dict[str, int]) -> None:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()  # forgets the groups, but does not destroy them
        forget_moe_log()  # holds groups
        gc.collect()  # models hold groups, in cycles
        torch.distributed.barrier()
        for group in list(distributed_c10d._world.pg_map):
            if group is not torch.distributed.group.WORLD:
                # Each group keeps several threads alive: left alone, they add up to thousands.
                torch.distributed.destroy_process_group(group)
    config = RunConfig(parallel=ParallelConfig(**sizes))
    build_process_groups(ParallelLayout.from_config(config, torch.distributed.get_world_size()))


def _seed(seed: int) -> None:
    random.seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # a job may have set it


def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"ranked_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
