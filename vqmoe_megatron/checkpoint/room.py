"""Whether the disk has room for a checkpoint: at the start by the plan, at a save by its size."""

from __future__ import annotations

import dataclasses

from vqmoe_megatron.config import ParallelConfig, RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.state_memory import state_bytes
from vqmoe_megatron.rundir.run_directory import RunDirectory
from vqmoe_megatron.runtime.node_facts import MINIMUM_FREE_BYTES


def planned_bytes(config: RunConfig) -> int:
    """Return the bytes of a checkpoint's weights, optimizer state and segment memory.

    The rest is small.

    ``config`` with ``model.vocab_size`` filled in. A checkpoint is the same at every layout.
    """
    optimizer = dataclasses.replace(
        config.optimizer, use_distributed_optimizer=False, overlap_param_gather=False
    )
    whole = dataclasses.replace(config, parallel=ParallelConfig(), optimizer=optimizer)
    state = state_bytes(whole, ParallelLayout.from_config(whole, 1), pipeline_rank=0)
    return state.weights + state.optimizer + state.segment_memory


def check_some_room(run_dir: RunDirectory) -> None:
    """Raise ``ValueError`` where not even logs and a small checkpoint fit."""
    free_bytes = run_dir.free_bytes()
    if free_bytes < MINIMUM_FREE_BYTES:
        raise ValueError(
            f"train.output_dir={run_dir.path} has {free_bytes / 1024**2:.0f} MiB free, less than "
            f"{MINIMUM_FREE_BYTES / 1024**2:.0f} MiB; free some or choose another directory"
        )


def check_checkpoint_room(config: RunConfig, run_dir: RunDirectory) -> None:
    """Refuse a start that the disk has no room for one checkpoint of.

    What saves that were cut off have left counts as room: the next save removes it first.

    Raises:
        ValueError: with what is needed and what is there.
    """
    abandoned = run_dir.checkpoints.glob("iter_*.incomplete/*")
    left_bytes = sum(file.stat().st_size for file in abandoned if file.is_file())
    problem = missing_room(run_dir, planned_bytes(config), left_bytes)
    if problem is not None:
        raise ValueError(f"there is no room for a checkpoint: {problem}")


def missing_room(run_dir: RunDirectory, num_bytes: int, extra_bytes: int = 0) -> str | None:
    """Return why a checkpoint of ``num_bytes`` does not fit, or None; ``extra_bytes`` get free."""
    free_bytes = run_dir.checkpoints_free_bytes() + extra_bytes
    needed_bytes = num_bytes + MINIMUM_FREE_BYTES
    if free_bytes >= needed_bytes:
        return None
    return (
        f"it needs {needed_bytes / 1e9:.2f} GB and {run_dir.checkpoints} has "
        f"{free_bytes / 1e9:.2f} GB free; free some, or lower checkpoint.keep_last"
    )
