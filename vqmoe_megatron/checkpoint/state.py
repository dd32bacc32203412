"""What a checkpoint holds, as Megatron's sharded state, and how it is put back at any layout.

1. Model: every tensor by its global name, place and shape (``sharded_state_dict``).
2. Optimizer: its tensors only, under names made from the model's. Groups, learning rates and decay
   come from the recipe and the schedule, so nothing depends on how ranks cut the parameters, nor on
   whether the optimizer is distributed. The main copies of fp32 training are the model's tensors
   and are stored once.
3. Random state: one row per rank, restored at the same layout only.
4. Transformer-XL's memory, by the rows of a global batch (``segment_memory``), if there is one.
5. Schedule, progress and MLflow run id: plain values, equal on all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase

from vqmoe_megatron.checkpoint.content import FORMAT_VERSION
from vqmoe_megatron.checkpoint.random_state import restore_random_states, sharded_random_states
from vqmoe_megatron.checkpoint.segment_memory import (
    restore_segment_memory,
    sharded_segment_memory,
)
from vqmoe_megatron.engines.megatron.optimizer_state import (
    OPTIMIZER_METADATA,
    as_stored,
    borrows_parameters,
    fill_adam_state,
    is_main_copy,
    prepare_for_loading,
    restore_adam_steps,
)


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    iteration: int
    consumed_samples: int
    skipped_iterations: int
    mlflow_run_id: str | None = None
    passed_over_samples: int = 0  # left out of the data order by rollbacks
    updates_of_an_older_optimizer: int = 0  # before an import, where its state began anew

    @property
    def num_updates(self) -> int:
        """Updates that the optimizer's state has seen."""
        num_updates = self.iteration - self.skipped_iterations
        return num_updates - self.updates_of_an_older_optimizer


@dataclass
class TrainingState:
    """Everything that a checkpoint restores."""

    model: list[torch.nn.Module]
    optimizer: Any
    scheduler: Any


def sharded_state(state: TrainingState, progress: Progress) -> dict[str, Any]:
    """Return the sharded state dict to save.

    Communicates: a distributed optimizer gathers its state over the data-parallel group.
    """
    fill_adam_state(state.optimizer, step=0.0)  # when every step so far was skipped
    models = _model_state(state)
    optimizer = _sharded_values(_optimizer_state(state, models, is_loading=False))
    if not state.model[0].config.bf16:  # the main copies are the model's own tensors
        optimizer = [part for part in optimizer if not is_main_copy(part)]
    return {
        **models,
        "optimizer": {str(number): value for number, value in enumerate(optimizer)},
        "scheduler": state.scheduler.state_dict(),
        "random_state": sharded_random_states(),
        **sharded_segment_memory(state.model),
        "progress": vars(progress).copy(),
        "num_updates": progress.num_updates,
        "format_version": FORMAT_VERSION,
    }


def load_checkpoint(folder: Path, state: TrainingState, has_same_layout: bool) -> Progress:
    """Restore ``state`` in place and return where the run stood.

    With another layout than the one that wrote the checkpoint the random state is left alone: its
    rows belong to ranks that no longer exist.

    Communicates over the world; all ranks call it together.

    The preflight has found the folder whole and of this release's format.
    """
    prepare_for_loading(state.optimizer)
    with torch.no_grad():
        models = _model_state(state)
        optimizer = _optimizer_state(state, models, is_loading=True)
        stored = set(dist_checkpointing.load_tensors_metadata(str(folder)))
        wanted = {
            str(number): as_stored(part, stored)
            for number, part in enumerate(_sharded_values(optimizer))
        }
        # Megatron reads a tensor once per call, and the model asks for its own too.
        borrowed = {n: part for n, part in wanted.items() if not part.key.startswith("optimizer.")}
        own = {number: part for number, part in wanted.items() if number not in borrowed}
        requested: dict[str, Any] = {**models, "optimizer": own}
        if has_same_layout:
            requested["random_state"] = sharded_random_states()
        requested |= sharded_segment_memory(state.model)
        loaded = dist_checkpointing.load(requested, str(folder))
        for number, chunk in enumerate(state.model):
            chunk.module.load_state_dict(loaded[f"model{number}"])
        values = loaded["optimizer"]
        if borrows_parameters(state.optimizer, stored):
            second = dist_checkpointing.load({"optimizer": borrowed}, str(folder))
            values |= second.get("optimizer", {})  # a rank may have nothing to borrow
        state.optimizer.load_state_dict(_filled(optimizer, iter([values[n] for n in wanted])))
        restore_adam_steps(state.optimizer, loaded["num_updates"])
        restore_segment_memory(state.model, loaded)
    state.scheduler.num_steps = 0  # Megatron adds the stored number to it
    state.scheduler.load_state_dict(loaded["scheduler"])
    if has_same_layout:
        restore_random_states(loaded["random_state"])
    return Progress(**loaded["progress"])


def _model_state(state: TrainingState) -> dict[str, Any]:
    # Of the modules inside Megatron's DDP: its load_state_dict does not take its own sharded keys.
    return {
        f"model{number}": chunk.module.sharded_state_dict()
        for number, chunk in enumerate(state.model)
    }


def _optimizer_state(state: TrainingState, models: dict[str, Any], is_loading: bool) -> Any:
    # Chunks of one rank share local names; the optimizer needs them apart.
    model_state = {f"{m}.{k}": part for m, chunk in models.items() for k, part in chunk.items()}
    return state.optimizer.sharded_state_dict(
        model_state, is_loading=is_loading, metadata=OPTIMIZER_METADATA
    )


def _sharded_values(tree: Any) -> list[ShardedBase]:
    """The sharded leaves of nested dicts and lists, in a fixed order."""
    if isinstance(tree, ShardedBase):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [value for part in tree for value in _sharded_values(part)]
    return []


def _filled(tree: Any, values: Any) -> Any:
    """``tree`` with its sharded leaves replaced by ``values``, in the same order."""
    if isinstance(tree, LocalNonpersistentObject):
        return tree.unwrap()
    if isinstance(tree, ShardedBase):
        return next(values)
    if isinstance(tree, dict):
        return {key: _filled(part, values) for key, part in tree.items()}
    if isinstance(tree, list):
        return [_filled(part, values) for part in tree]
    return tree
