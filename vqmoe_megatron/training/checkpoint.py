"""Checkpoints in Megatron's torch_dist format: complete or absent.

``checkpoints/iter_0000100.incomplete`` is written by all ranks, renamed to ``iter_0000100`` when
every rank is done, and only then named by ``latest_checkpointed_iteration.txt``. A kill at any
moment leaves the previous checkpoint in place.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.recipe import load_recipe, save_recipe
from vqmoe_megatron.training.optimizer_state import (
    OPTIMIZER_METADATA,
    prepare_for_loading,
    restore_adam_steps,
)
from vqmoe_megatron.training.random_state import restore_random_states, sharded_random_states

TRACKER_FILE = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "run_config.yaml"
FOLDER_PATTERN = re.compile(r"^iter_(\d{7})$")
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


def find_checkpoint(path: Path) -> Path | None:
    """Return the ``iter_`` folder meant by a run directory, its checkpoints folder, or the folder.

    None when there is no complete checkpoint.

    Raises:
        ValueError: when the tracker names a folder that is not there.
    """
    if FOLDER_PATTERN.match(path.name):
        return path if (path / "metadata.json").exists() else None
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    tracker = folder / TRACKER_FILE
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise ValueError(f"{tracker} holds {text!r} instead of an iteration number")
    found = folder / f"iter_{int(text):07d}"
    if not (found / "metadata.json").exists():
        raise ValueError(
            f"{tracker} names {found.name}, but that checkpoint is missing or incomplete; write the "
            f"iteration of a complete one into {tracker.name}: {_complete(folder) or 'none is left'}"
        )
    return found


def save_checkpoint(
    checkpoints: Path, config: RunConfig, state: TrainingState, progress: Progress, keep_last: int
) -> Path:
    """Write, publish and rotate. Communicates over the world; all ranks call it together.

    Raises:
        OSError: on any rank's failed write; nothing is published then.
    """
    folder = checkpoints / f"iter_{progress.iteration:07d}"
    partial = folder.with_name(folder.name + ".incomplete")
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(_sharded_state(state, progress, is_loading=False), str(partial))
    torch.distributed.barrier()
    if is_first:
        save_recipe(config, partial / CONFIG_FILE)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
        _write_atomically(checkpoints / TRACKER_FILE, f"{progress.iteration}\n")
        for old in _complete(checkpoints)[:-keep_last]:
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
            chunk.load_state_dict(loaded[f"model{number}"])
        state.optimizer.load_state_dict(loaded["optimizer"])
        restore_adam_steps(state.optimizer, loaded["num_updates"])
    state.scheduler.load_state_dict(loaded["scheduler"])
    restore_random_states(loaded["random_state"])
    return Progress(**loaded["progress"])


def check_resumable(folder: Path, config: RunConfig) -> None:
    """Raise ``ValueError`` when the checkpoint belongs to another model or layout."""
    stored = load_recipe(folder / CONFIG_FILE, [])
    differences = []
    for section in ("model", "vq", "parallel"):
        ours, theirs = vars(getattr(config, section)), vars(getattr(stored, section))
        differences += [
            f"{section}.{name}: checkpoint {theirs[name]!r}, recipe {value!r}"
            for name, value in ours.items()
            if value != theirs[name] and not name.startswith("recompute_")
        ]
    if (ours := config.optimizer.use_distributed_optimizer) != (
        theirs := stored.optimizer.use_distributed_optimizer
    ):
        differences.append(
            f"optimizer.use_distributed_optimizer: checkpoint {theirs}, recipe {ours}"
        )
    if differences:
        raise ValueError(
            f"{folder} cannot be resumed with this recipe:\n  "
            + "\n  ".join(differences)
            + "\nthis release resumes the same model at the same layout; set these back, or start "
            "in another train.output_dir"
        )


def _sharded_state(state: TrainingState, progress: Progress, is_loading: bool) -> dict[str, Any]:
    models = {
        f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(state.model)
    }
    merged = {key: part for chunk in models.values() for key, part in chunk.items()}
    model_state = models["model0"] if len(models) == 1 else merged
    if len(models) > 1:
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


def _complete(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if FOLDER_PATTERN.match(entry.name) and (entry / "metadata.json").exists()
    )


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
