"""Random state of a rank as plain tensors, so that a checkpoint never holds a pickle of ours.

W ranks. Every generator of a rank is one row of a [W, num_bytes] uint8 tensor.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

ITERATION_STRIDE = 1_000_003  # between the seeds of two iterations


def seed_generators(seed: int, iteration: int = 0) -> None:
    """Seed every generator of this rank for its place in the layout. No communication.

    As Megatron-LM, pipeline stages draw different dropout masks. ``iteration`` is where a run goes
    on at another layout: it must not draw its first masks again.
    """
    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    stage_seed = (stage_seed + ITERATION_STRIDE * iteration) % 2**31
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def random_states() -> dict[str, torch.Tensor]:
    """Return this rank's generator states by name, uint8 CPU vectors. No communication."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in get_cuda_rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.cpu().contiguous() for name, state in states.items()}


def restore_random_states(states: dict[str, torch.Tensor]) -> None:
    """Undo :func:`random_states` on the same rank of the same layout."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    tracker = get_cuda_rng_tracker()
    tracker.set_states({name: states[f"tracker.{name}"].clone() for name in tracker.get_states()})


def sharded_random_states() -> dict[str, ShardedTensor]:
    """The states as rows of global tensors, one row per rank."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return {
        name: ShardedTensor.from_rank_offsets(
            f"random_state.{name}", state, (0, rank, world_size), prepend_axis_num=1
        )
        for name, state in random_states().items()
    }
