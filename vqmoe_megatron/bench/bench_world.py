"""The world a benchmark runs in: one rank for times, local gloo ranks for bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from vqmoe_megatron.config import ParallelConfig, RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.runtime.host_memory import keep_free_memory
from vqmoe_megatron.runtime.world import (
    RankVariables,
    build_process_groups,
    choose_device,
    discover_rank,
    join_world,
    leave_world,
)

SEED = 1234  # of Megatron's generators, which nothing that is measured draws from


@contextmanager
def one_rank_world() -> Iterator[str]:
    """Be a world of one rank; yields ``"cuda"`` or ``"cpu"``.

    On the CPU the process keeps the memory it frees from now on, for all arms alike.

    Raises:
        ValueError: when a launcher started several ranks.
    """
    variables = discover_rank()
    if variables.world_size > 1:
        raise ValueError(
            f"{variables.source} started {variables.world_size} ranks, but this benchmark is one "
            "process; start it directly"
        )
    device, _ = choose_device("auto")
    if device == "cpu":
        from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat

        install_cpu_compat()
        if not keep_free_memory():
            print("this C library cannot keep freed memory: page faults are part of the times")
    join_world(RankVariables(0, 1, 0, "benchmark"), device)
    lay_out({})
    try:
        yield device
    finally:
        leave_world()


def lay_out(sizes: Mapping[str, int]) -> None:
    """Build the process groups of a layout, in the place of those of the one before.

    Args:
        sizes: ``ParallelConfig`` fields; those left out are 1.

    Communicates: all ranks of the world take part.
    """
    from megatron.core import parallel_state, tensor_parallel

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
        torch.distributed.barrier()
    config = RunConfig(parallel=ParallelConfig(**sizes))
    build_process_groups(ParallelLayout.from_config(config, torch.distributed.get_world_size()))
    tensor_parallel.model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
