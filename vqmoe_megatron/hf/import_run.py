"""``vqmoe import DIR --out RUN_DIR``: an export becomes a run directory that trains on.

One process builds the whole model, fills it and saves a checkpoint as a run does, which any layout
loads. The directory is complete or not there.

The iteration, the place in the data, the learning-rate schedule and every tensor of the model are
those of the checkpoint that was exported. The optimizer's moments are not in an export: Adam starts
anew, and counts its updates from there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from vqmoe_megatron import registry
from vqmoe_megatron.checkpoint.table_export import world_of_one
from vqmoe_megatron.config import ParallelConfig, RunConfig
from vqmoe_megatron.hf.rules import check_has_hf_form
from vqmoe_megatron.hf.shards import TensorFiles
from vqmoe_megatron.hf.training_files import TRAINING_STEM, Training, read_training
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.rundir.own_outputs import check_new_folder, new_folder
from vqmoe_megatron.rundir.run_directory import RunDirectory


@dataclass(frozen=True)
class HfImport:
    """What was written."""

    out: Path
    checkpoint: Path  # the iter_ folder
    iteration: int
    train_iters: int  # of the recipe
    decay_iters: int  # of its learning-rate schedule
    num_tensors: int  # of the model
    is_bf16: bool


def import_hf(folder: Path, out: Path) -> HfImport:
    """Write the model of an export as the only checkpoint of the new run directory ``out``.

    Args:
        folder: as ``vqmoe export --hf`` left it.
        out: not there yet, or empty.

    Makes this process a world of one rank and ends it again.

    Raises:
        ValueError: for another folder or a damaged one, an ``out`` that is not new, or one of
            several ranks; nothing is written then.
    """
    training = read_training(folder)
    check_has_hf_form(training.config)
    check_new_folder(out)
    with world_of_one(training.config, "import") as layout, new_folder(out) as partial:
        return _write(training, layout, partial, out)


def _write(training: Training, layout: ParallelLayout, partial: Path, out: Path) -> HfImport:
    from vqmoe_megatron.checkpoint.random_state import seed_generators
    from vqmoe_megatron.checkpoint.room import check_checkpoint_room
    from vqmoe_megatron.checkpoint.saver import CheckpointSaver, SavedRun, SaveFailed
    from vqmoe_megatron.checkpoint.state import Progress, TrainingState
    from vqmoe_megatron.engines.megatron.engine import MegatronEngine
    from vqmoe_megatron.hf.module_tensors import fill_model

    config = training.config
    config = replace(config, train=replace(config.train, output_dir=str(out)))
    progress = Progress(**training.progress)
    num_updates = progress.iteration - progress.skipped_iterations  # the new optimizer knows none
    progress = replace(progress, mlflow_run_id=None, updates_of_an_older_optimizer=num_updates)
    built_as = _on_one_rank(config)
    seed_generators(config.train.seed)  # what they draw is overwritten
    task = registry.load("task", config.train.task)(built_as, None)
    engine = MegatronEngine.build(built_as, layout, task)  # any engine resumes what it saves
    (chunk,) = engine.model
    model = chunk.module.module if config.model.bf16 else chunk.module
    num_tensors = fill_model(
        model, TensorFiles(training.folder), TensorFiles(training.folder, TRAINING_STEM)
    )
    engine.optimizer.reload_model_params()
    engine.scheduler.num_steps = 0  # Megatron adds the stored number to it
    engine.scheduler.load_state_dict(training.scheduler)
    seed_generators(config.train.seed, progress.iteration)
    state = TrainingState(engine.model, engine.optimizer, engine.scheduler)
    run = SavedRun(config, layout, training.corpus_content, RunDirectory(partial))
    check_checkpoint_room(config, RunDirectory(partial))
    try:
        written = CheckpointSaver(run, state).save(progress, in_background=False)
    except SaveFailed as error:
        raise ValueError(str(error)) from error
    return HfImport(
        out=out,
        checkpoint=out / written.relative_to(partial),
        iteration=progress.iteration,
        train_iters=config.train.train_iters,
        decay_iters=config.optimizer.lr_decay_iters or config.train.train_iters,
        num_tensors=num_tensors,
        is_bf16=config.model.bf16,
    )


def _on_one_rank(config: RunConfig) -> RunConfig:
    """The recipe as one rank builds it, wherever it trained."""
    optimizer = replace(
        config.optimizer,
        use_distributed_optimizer=False,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    train = replace(config.train, device="auto")
    return replace(config, parallel=ParallelConfig(), optimizer=optimizer, train=train)
