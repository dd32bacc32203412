"""One rank of a world that does not exist takes one training step; what it would send is counted.

Run in a process of its own, because Megatron, torch and the CPU layer keep global state:

    python -m vqmoe_megatron.simulate.simulated_rank FOLDER

FOLDER holds ``job.json`` and ``run_config.yaml``; ``result.json`` is written beside them.

1. A fake process group: all groups of the layout, none of the other ranks.
2. The real model, DDP and optimizer, of fake tensors.
3. One call of the real training step, with balanced routing.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nothing is computed; must precede torch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.layout import ParallelLayout, check_layout
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat
from vqmoe_megatron.runtime.fused_parts import PLAIN
from vqmoe_megatron.runtime.third_party_noise import quiet_known_messages
from vqmoe_megatron.simulate.simulated_step import JOB_FILE, RESULT_FILE


def run_job(folder: Path) -> None:
    """Simulate every rank of the folder's job, one after the other."""
    started = time.perf_counter()
    job = json.loads((folder / JOB_FILE).read_text())
    config = load_recipe(folder / CONFIG_FILE, [])
    quiet_known_messages()
    install_cpu_compat()
    mode = FakeTensorMode()
    found = [simulate_rank(config, job["world_size"], rank, mode) for rank in job["ranks"]]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "ranks": found,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time(),
        "peak_memory_bytes": kilobytes * 1024,
    }
    (folder / RESULT_FILE).write_text(json.dumps(result))


def simulate_rank(
    config: RunConfig, world_size: int, rank: int, mode: FakeTensorMode
) -> dict[str, Any]:
    """Return what ``rank`` sends in one step: ``counted`` is a list of [collective, axis, calls,
    bytes as numerator, denominator].

    ``mode`` is one for all ranks of a process: Megatron keeps tensors in global variables. Leaves
    no process group behind. No communication.
    """
    started = time.perf_counter()
    config = without_values(config)
    layout = check_layout(config, world_size, "cpu")
    join_fake_world(layout, rank)
    from megatron.core import parallel_state

    from vqmoe_megatron.engines.megatron.engine import MegatronEngine
    from vqmoe_megatron.runtime.collective_counter import process_group_axes
    from vqmoe_megatron.runtime.cpu_compat.fake_world import fake_world
    from vqmoe_megatron.simulate.empty_batches import empty_batches, task_of
    from vqmoe_megatron.simulate.engines import SimulatedEngine
    from vqmoe_megatron.simulate.fake_collectives import SimulatedCollectives
    from vqmoe_megatron.simulate.fake_tensors import FakeValues
    from vqmoe_megatron.simulate.row_planners import SimulatedPlanner, use_planner

    counter = SimulatedCollectives(process_group_axes())
    with fake_world(), mode, FakeValues(), counter:
        # Gloo groups beside fake ones would look for the other ranks.
        parts = MegatronEngine.build(config, layout, task_of(config), SimulatedEngine, False, PLAIN)
        use_planner(parts.model, SimulatedPlanner())
        for chunk in parts.model:
            chunk.train()
        counter.reset()
        parts.step([empty_batches(config) for _ in parts.model], 0, False)
    found = {
        "rank": rank,
        "pipeline_rank": parallel_state.get_pipeline_model_parallel_rank(),
        "num_parameters": sum(p.numel() for chunk in parts.model for p in chunk.parameters()),
        "counted": [
            [*key, calls, sent.numerator, sent.denominator]
            for key, (calls, sent) in counter.counted.items()
        ],
        "seconds": time.perf_counter() - started,
    }
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return found


def without_values(config: RunConfig) -> RunConfig:
    """Nothing is drawn (but a head of classes, whose rule asks for it), and no codebook waits for
    the first tokens; neither sends in a step. Experts in fp8 are sent the same rows."""
    return replace(
        config,
        model=replace(config.model, fp8=None),
        train=replace(config.train, layout_independent_init=config.finetune.is_on),
        vq=replace(config.vq, init="uniform", code_map="mod"),
    )


def join_fake_world(layout: ParallelLayout, rank: int, backend: str = "fake") -> None:
    """Make all process groups of the layout, as ``rank``, without any other rank.

    ``backend`` is torch's text, for tensors of other devices than CPU and CUDA.
    """
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        backend, rank=rank, world_size=layout.world_size, store=FakeStore()
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)


if __name__ == "__main__":
    run_job(Path(sys.argv[1]))
