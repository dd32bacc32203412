"""A new run whose first checkpoint is a VQMoE that computes a trained model's function.

1. Recipe, source, corpus and the new directory are judged by files alone.
2. This process becomes a world of one rank. The source is built, filled and evaluated, and let go.
3. The recipe's model is built and filled; what the source has not starts silent, codes by k-means.
4. It is evaluated on the same windows. Where the two losses differ, nothing is published.
5. Checkpoint 0, recipe, status and the source's provenance take the directory's name in one step.

Optimizer, schedule and data position start anew, as the recipe says. Megatron is imported in 2 and
later, after the CPU has been made fit for it.
"""

from __future__ import annotations

import gc
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vqmoe_megatron import __version__, registry
from vqmoe_megatron.checkpoint.room import check_checkpoint_room
from vqmoe_megatron.checkpoint.table_export import world_of_one
from vqmoe_megatron.config import ParallelConfig, RunConfig, TrainConfig
from vqmoe_megatron.config.recipe import save_recipe
from vqmoe_megatron.data.corpus import Corpus, check_tokenizer, load_corpus
from vqmoe_megatron.plan.layout import ParallelLayout, check_layout, minimum_world_size
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.file_names import UPCYCLE_FILE
from vqmoe_megatron.rundir.own_outputs import check_new_folder, new_folder
from vqmoe_megatron.rundir.run_directory import RunDirectory
from vqmoe_megatron.rundir.status import write_status
from vqmoe_megatron.runtime.world import choose_device
from vqmoe_megatron.train.preflight import check_enough_text, check_parts
from vqmoe_megatron.upcycle.megatron_args import argument_problems, stored_arguments
from vqmoe_megatron.upcycle.rules import (
    check_becomes_experts,
    check_same_function,
    check_target,
    output_scale,
)
from vqmoe_megatron.upcycle.source import OURS, Source, open_source

if TYPE_CHECKING:
    from vqmoe_megatron.engines.engine import Engine
    from vqmoe_megatron.tasks.task import Task

# Nats per token by which the losses may differ. Sums in another order differ by parts in 1e7; in
# bf16 a product rounds to 8 bits, so that another kernel's loss differs by parts in 1e4.
FP32_TOLERANCE, BF16_TOLERANCE = 1e-6, 2e-3


@dataclass(frozen=True)
class Upcycled:
    """What was written, and how it was measured."""

    run_dir: Path
    source: str  # folder
    source_kind: str
    source_iteration: int | None
    source_index_sha256: str
    dense_layers: int  # whose MLP became experts
    num_copied_tensors: int  # stored ones
    output_scale: float  # of experts that were one dense MLP
    sampled_tokens: dict[str, int]  # for k-means, by codebook
    windows: str  # what was evaluated
    source_scores: dict[str, float]
    scores: dict[str, float]  # of the new model, before its first step
    tolerance: float
    num_ranks: int  # the fewest that the recipe's layout fits on

    @property
    def difference(self) -> float:
        """Of the losses, in nats per token."""
        return self.scores["val/loss"] - self.source_scores["val/loss"]


@dataclass(frozen=True)
class Upcycling:
    """What may be done; see :func:`check_upcycling`."""

    source: Source
    config: RunConfig  # of the new run, with model.vocab_size filled in
    evaluated: RunConfig  # the same in one process, as it is built here
    corpus: Corpus
    out: Path
    num_ranks: int  # the fewest that the recipe's layout fits on
    notes: list[str]  # what could not be checked


def upcycle(upcycling: Upcycling) -> Upcycled:
    """Write the new run directory. Makes this process a world of one rank and ends it again.

    Raises:
        ValueError: for several ranks, and as :func:`upcycle_here`.
    """
    with world_of_one(upcycling.evaluated, "upcycle") as layout:
        return upcycle_here(upcycling, layout)


def check_upcycling(source_path: Path, config: RunConfig, out: Path) -> Upcycling:
    """Judge everything by files alone; nothing is written, no rank started.

    Args:
        source_path: a run directory, a folder that Megatron saved into, or one iter_ folder.
        config: the recipe of the new run; ``train.output_dir`` becomes ``out``.
        out: not there yet, or empty.

    Raises:
        ValueError: for a recipe that cannot start as the source's function, a source or corpus that
            does not fit it, and an ``out`` that is not new.
    """
    check_target(config)
    check_new_folder(out)
    device, _ = choose_device(config.train.device)
    num_ranks = minimum_world_size(config)
    check_layout(config, num_ranks, device)
    check_parts(config, device)
    source = open_source(source_path)
    corpus = load_corpus(Path(config.data.path))
    check_tokenizer(corpus, config.model.vocab_size)
    source.check_vocabulary(corpus)
    vocab_size = config.model.vocab_size or corpus.vocab_size
    config = replace(
        config,
        model=replace(config.model, vocab_size=vocab_size),
        train=replace(config.train, output_dir=str(out)),
    )
    evaluated = _evaluated(config)
    check_enough_text(evaluated, corpus)
    notes = _check_fits(source, config)
    return Upcycling(source, config, evaluated, corpus, out, num_ranks, notes)


def _evaluated(config: RunConfig) -> RunConfig:
    """The recipe in one process, with evaluation where it has none, and codes by k-means."""
    eval_iters = config.train.eval_iters or TrainConfig.eval_iters
    return replace(
        config,
        parallel=ParallelConfig(),
        train=replace(config.train, eval_iters=eval_iters),
        vq=replace(config.vq, init="kmeans"),
    )


def _check_fits(source: Source, config: RunConfig) -> list[str]:
    """Refuse a source whose function the recipe's model would not have; say what is not known."""
    model = config.model
    if source.config is not None:
        check_same_function(source.config, config)
    if source.num_layers != model.num_layers:
        raise ValueError(
            f"{source.folder} has {source.num_layers} layers, the recipe model.num_layers="
            f"{model.num_layers}; set it to {source.num_layers}"
        )
    counts = {source.num_experts(layer) for layer in range(model.num_layers)} - {None, 1}
    for count in counts - {model.num_moe_experts}:
        raise ValueError(
            f"{source.folder} has {count} experts, the recipe model.num_moe_experts="
            f"{model.num_moe_experts}; set it to {count}"
        )
    if _num_dense(source, config) and model.num_moe_experts > 1:
        check_becomes_experts(model)
    if source.kind == OURS:
        return []
    arguments = stored_arguments(source.folder)
    if arguments is None:
        return [
            "the source does not hold Megatron-LM's args: heads, activation, norm's epsilon, "
            "rotary base and top-k are the recipe's. Compare the loss below with the source's own"
        ]
    problems = argument_problems(arguments, model, bool(counts))
    if problems:
        raise ValueError(
            "the source cannot become this recipe's model:\n  - " + "\n  - ".join(problems)
        )
    return []


def _num_dense(source: Source, config: RunConfig) -> int:
    """Layers with experts in the recipe whose MLP is dense in the source."""
    layers = range(0, config.model.num_layers, config.model.moe_layer_freq)
    return sum(source.num_experts(layer) in (None, 1) for layer in layers)


def upcycle_here(upcycling: Upcycling, layout: ParallelLayout) -> Upcycled:
    """Steps 2 to 5, in a world of one rank whose process groups stand.

    Raises:
        ValueError: for tensors that do not fit, no room, and losses that differ. Nothing is left
            of what was written then.
    """
    from vqmoe_megatron.checkpoint.random_state import seed_generators
    from vqmoe_megatron.checkpoint.saver import CheckpointSaver, SavedRun, SaveFailed
    from vqmoe_megatron.checkpoint.state import Progress, TrainingState
    from vqmoe_megatron.upcycle.new_parts import find_codes, silence
    from vqmoe_megatron.upcycle.source_model import evaluated_source
    from vqmoe_megatron.upcycle.tensor_map import copy_tensors

    source, corpus, out = upcycling.source, upcycling.corpus, upcycling.out
    config, evaluated = upcycling.config, upcycling.evaluated
    seed_generators(config.train.seed)
    new_task = registry.load("task", config.train.task)
    task: Task = new_task(evaluated, corpus)
    engine = evaluated_source(source, evaluated, layout, task)
    windows, source_scores = _scores(engine, task)
    del engine
    gc.collect()  # of two models one at a time

    seed_generators(config.train.seed)
    engine = registry.load("engine", config.train.engine).build(evaluated, layout, task)
    (chunk,) = engine.model
    scale = output_scale(config.model)
    num_copied, new = copy_tensors(chunk.module, source, scale)
    silence(chunk.module, new)
    with new_folder(out) as partial:
        run_dir = RunDirectory(partial)
        check_checkpoint_room(config, run_dir)
        here = replace(evaluated, train=replace(evaluated.train, output_dir=str(partial)))
        sampled = find_codes(engine, new_task(here, corpus), here)
        _, scores = _scores(engine, task)
        num_dense = _num_dense(source, config)
        done = Upcycled(
            run_dir=out,
            source=str(source.folder.resolve()),
            source_kind=source.kind,
            source_iteration=source.iteration,
            source_index_sha256=source.index_sha256,
            dense_layers=num_dense,
            num_copied_tensors=num_copied,
            output_scale=scale if num_dense else 1.0,
            sampled_tokens=sampled,
            windows=windows,
            source_scores=source_scores,
            scores=scores,
            tolerance=BF16_TOLERANCE if config.model.bf16 else FP32_TOLERANCE,
            num_ranks=upcycling.num_ranks,
        )
        _check_equal(done)
        engine.optimizer.reload_model_params()
        state = TrainingState(engine.model, engine.optimizer, engine.scheduler)
        saver = CheckpointSaver(SavedRun(config, layout, corpus.content, run_dir), state)
        try:
            saver.save(Progress(0, 0, 0), in_background=False)
        except SaveFailed as error:  # the disk filled since its room was checked
            raise ValueError(str(error)) from error
        save_recipe(config, run_dir.config)
        write_status(partial, "requeue", 0, f"upcycled from {done.source}, not trained yet")
        replace_file(partial / UPCYCLE_FILE, _provenance(done))
    return done


def _scores(engine: Engine, task: Task) -> tuple[str, dict[str, float]]:
    from vqmoe_megatron.train.evaluate import evaluate

    windows = task.evaluation_batches()
    return windows.description, evaluate(engine, task, windows, pipeline_size=1)


def _check_equal(done: Upcycled) -> None:
    """Refuse to publish another function than the source's."""
    before, after = done.source_scores["val/loss"], done.scores["val/loss"]
    if math.isfinite(after) and abs(done.difference) <= done.tolerance:
        return
    raise ValueError(
        f"not written: the loss of the source is {before:.8f} nats per token and that of the new "
        f"model {after:.8f}, {done.difference:+.1e} apart, more than {done.tolerance:.0e}. The "
        "recipe's model computes another function than the source's"
    )


def _provenance(done: Upcycled) -> str:
    content = asdict(done) | {"difference": done.difference}
    content |= {"run_dir": str(done.run_dir), "written_by": f"vqmoe_megatron {__version__}"}
    return json.dumps(content, indent=2) + "\n"
