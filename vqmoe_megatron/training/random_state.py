"""Random state of a rank as plain tensors, so that a checkpoint never holds a pickle of ours.

W ranks. Every generator of a rank is one row of a [W, num_bytes] uint8 tensor.
"""

from __future__ import annotations

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel import get_cuda_rng_tracker


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
