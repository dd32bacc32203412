"""Checkpoints in Megatron's torch_dist format: complete or absent.

``checkpoints/iter_0000100.incomplete`` is written by all ranks, renamed to ``iter_0000100`` when
every rank is done, and only then named by ``latest_checkpointed_iteration.txt``. A kill at any
moment leaves the previous checkpoint in place.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from vqmoe_megatron.data.corpus import CORPUS_FILE
from vqmoe_megatron.recipe import save_recipe
from vqmoe_megatron.training.checkpoint_folder import (
    CONFIG_FILE,
    CORPUS_COPY,
    LAYOUT_FILE,
    TRACKER_FILE,
    complete_checkpoints,
)
from vqmoe_megatron.training.optimizer_state import (
    OPTIMIZER_METADATA,
    prepare_for_loading,
    restore_adam_steps,
)
from vqmoe_megatron.training.preflight import CheckedRun
from vqmoe_megatron.training.random_state import restore_random_states, sharded_random_states

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    iteration: int
    consumed_samples: int
    skipped_iterations: int
    mlflow_run_id: str | None = None


@dataclass
class TrainingState:
    """Everything that a checkpoint restores."""

    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any


def save_checkpoint(run: CheckedRun, state: TrainingState, progress: Progress) -> Path:
    """Write, publish and rotate to ``checkpoint.keep_last``; return the new folder.

    Later checkpoints than this one, left by an attempt that was rolled back, are not touched.
    Communicates over the world; all ranks call it together.

    Raises:
        OSError: on any rank's failed write; nothing is published then.
    """
    for chunk in state.model:
        if chunk.ddp_config.overlap_param_gather:
            # The updated shards would be gathered only by the next forward: gather them now.
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()
    checkpoints = run.run_dir.checkpoints
    folder = checkpoints / f"iter_{progress.iteration:07d}"
    partial = folder.with_name(folder.name + ".incomplete")
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        for abandoned in checkpoints.glob("iter_*.incomplete"):
            shutil.rmtree(abandoned)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_sharded_state(state, progress, is_loading=False), str(partial))
    torch.distributed.barrier()
    if is_first:
        save_recipe(run.config, partial / CONFIG_FILE)
        shutil.copyfile(run.corpus.path / CORPUS_FILE, partial / CORPUS_COPY)
        (partial / LAYOUT_FILE).write_text(json.dumps(asdict(run.layout), indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        _write_atomically(checkpoints / TRACKER_FILE, f"{progress.iteration}\n")
        not_later = [name for name in complete_checkpoints(checkpoints) if name <= folder.name]
        for old in not_later[: -run.config.checkpoint.keep_last]:
            shutil.rmtree(checkpoints / old)
    torch.distributed.barrier()
    return folder


def load_checkpoint(folder: Path, state: TrainingState) -> Progress:
    """Restore ``state`` in place and return where the run stood.

    Communicates over the world; all ranks call it together.

    Raises:
        ValueError: when the folder is of another format version.
    """
    prepare_for_loading(state.optimizer)
    with torch.no_grad():
        loaded = dist_checkpointing.load(
            _sharded_state(state, Progress(0, 0, 0), is_loading=True), str(folder)
        )
        if loaded["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{folder} has checkpoint format {loaded['format_version']}, this release reads "
                f"{FORMAT_VERSION}"
            )
        for number, chunk in enumerate(state.model):
            chunk.module.load_state_dict(loaded[f"model{number}"])
        state.optimizer.load_state_dict(loaded["optimizer"])
        restore_adam_steps(state.optimizer, loaded["num_updates"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    restore_random_states(loaded["random_state"])
    return Progress(**loaded["progress"])


def _sharded_state(state: TrainingState, progress: Progress, is_loading: bool) -> dict[str, Any]:
    # Of the modules inside Megatron's DDP: its load_state_dict does not take its own sharded keys.
    models = {
        f"model{number}": chunk.module.sharded_state_dict()
        for number, chunk in enumerate(state.model)
    }
    # Chunks of one rank share local names; the optimizer needs them apart.
    model_state = {f"{m}.{k}": part for m, chunk in models.items() for k, part in chunk.items()}
    optimizer = state.optimizer.sharded_state_dict(
        model_state, is_loading=is_loading, metadata=OPTIMIZER_METADATA
    )
    return {
        **models,
        "optimizer": optimizer,
        "scheduler": state.scheduler.state_dict(),
        "random_state": sharded_random_states(),
        "progress": vars(progress).copy(),
        "num_updates": progress.iteration - progress.skipped_iterations,
        "format_version": FORMAT_VERSION,
    }


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
