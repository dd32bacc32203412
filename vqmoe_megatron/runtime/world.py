"""Join a world of ranks: who am I, how many are we, which device, which process groups.

Ranks learn their place from the first launch substrate of the registry that is here: torchrun's
variables, else Slurm's, else those of a user's package, else a single process.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from vqmoe_megatron import registry
from vqmoe_megatron.config.declared_types import shown
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.runtime.meeting_place import MeetingPlace
from vqmoe_megatron.runtime.rendezvous import meet, never_stop

COLLECTIVE_TIMEOUT_MINUTES = 10
RENDEZVOUS_SECONDS = 600.0


@dataclass(frozen=True)
class RankVariables:
    """One rank's place, and which launcher said so."""

    rank: int
    world_size: int
    local_rank: int
    source: str


def discover_rank(environ: Mapping[str, str] = os.environ) -> RankVariables:
    """Read the rank from the variables of its launch substrate, or answer a world of one.

    Raises:
        ValueError: when a launcher set some of its variables but not all, or one is not an integer
            or out of range; the message names them.
    """
    for source in registry.names("substrate"):
        substrate = registry.load("substrate", source)()
        if not substrate.is_here(environ):
            continue
        names = substrate.variables
        present = [name for name in names if name in environ]
        missing = [name for name in names if name not in environ]
        if missing:
            raise ValueError(
                f"{source} set {', '.join(present)} but not {', '.join(missing)}; start the ranks "
                f"with {_starters()}, or unset these variables for a single process"
            )
        rank, world_size, local_rank = (_integer(name, environ[name]) for name in names)
        rank_name, world_size_name, local_rank_name = names
        if world_size < 1:
            raise ValueError(f"{world_size_name}={world_size} must be at least 1 ({source})")
        if not 0 <= rank < world_size:
            raise ValueError(
                f"0 <= {rank_name} < {world_size_name} fails: {rank} of {world_size} ({source})"
            )
        if not 0 <= local_rank < world_size:
            raise ValueError(
                f"0 <= {local_rank_name} < {world_size_name} fails: {local_rank} of {world_size} "
                f"({source})"
            )
        return RankVariables(rank, world_size, local_rank, source)
    return RankVariables(0, 1, 0, "single process")


def _starters() -> str:
    """``torchrun or srun``, and those of a user's own."""
    kinds = registry.names("substrate")
    return " or ".join(registry.load("substrate", kind).starter for kind in kinds)


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(
            f"{name}={shown(text)} is not an integer; its launcher must set it, or unset it for a "
            "single process"
        ) from None


def choose_device(requested: str) -> tuple[str, str]:
    """Return ``("cuda" | "cpu", reason)`` for train.device = auto | cpu | cuda.

    Raises:
        ValueError: when CUDA is asked for and absent, or the CPU is asked for beside a GPU.
    """
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ValueError("train.device=cuda, but torch sees no CUDA device here; use auto or cpu")
    if requested == "cpu" and available:
        raise ValueError(
            "train.device=cpu, but CUDA is visible and megatron-core would use it; hide it with "
            "CUDA_VISIBLE_DEVICES='' to run on the CPU"
        )
    if available:
        return "cuda", "torch sees a CUDA device"
    return "cpu", "torch sees no CUDA device"


def join_world(
    variables: RankVariables,
    device: str,
    should_stop: Callable[[], bool] = never_stop,
    wait_seconds: float = RENDEZVOUS_SECONDS,
) -> None:
    """Initialise torch.distributed: NCCL on CUDA, gloo on CPU.

    Communicates: all ranks meet at MASTER_ADDR:MASTER_PORT, then make the world's process group.

    Args:
        variables: this rank's place.
        device: ``"cuda"`` or ``"cpu"``.
        should_stop: asked while waiting for the others; True on any rank calls all of them off.
        wait_seconds: for the others to come.

    Raises:
        ValueError: when several ranks are told to meet but not where.
        StoppedWhileWaiting: when ``should_stop`` ended the wait, here or on another rank.
        RendezvousFailed: when not all ranks came; the message names the missing ones.
    """
    if device == "cuda":
        torch.cuda.set_device(variables.local_rank % torch.cuda.device_count())
    timeout = datetime.timedelta(minutes=COLLECTIVE_TIMEOUT_MINUTES)
    if variables.world_size == 1:
        store = torch.distributed.HashStore()
    else:
        place = MeetingPlace.from_environ(os.environ)
        store = meet(place, variables.rank, variables.world_size, should_stop, wait_seconds)
        store.set_timeout(timeout)
    torch.distributed.init_process_group(
        backend="nccl" if device == "cuda" else "gloo",
        rank=variables.rank,
        world_size=variables.world_size,
        store=store,
        timeout=timeout,
    )


def build_process_groups(layout: ParallelLayout) -> None:
    """Create Megatron's process groups for ``layout``.

    Communicates: every rank takes part in creating every group.
    """
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
    )


def leave_world() -> None:
    """Destroy the process groups. Communicates over all ranks; not for error paths."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
