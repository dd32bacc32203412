"""Everything that can refuse a run, before any rank trains."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron import registry
from vqmoe_megatron.checkpoint.content import check_format_version, read_content
from vqmoe_megatron.checkpoint.folder import (
    CORPUS_COPY,
    check_resumable,
    find_checkpoint,
    iteration_of,
    stored_tokenizer,
)
from vqmoe_megatron.checkpoint.remap_rules import check_backbone, check_remap
from vqmoe_megatron.checkpoint.room import check_checkpoint_room, check_some_room
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_saved_recipe
from vqmoe_megatron.data.corpus import Corpus, check_tokenizer, load_corpus
from vqmoe_megatron.data.image_set import ImageSet, load_image_set
from vqmoe_megatron.data.labelled_texts import checked_texts
from vqmoe_megatron.data.sample_order import check_cache_dir, order_name
from vqmoe_megatron.metrics.table import metric_table
from vqmoe_megatron.plan.layout import ParallelLayout, check_layout
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.rundir.run_directory import RunDirectory
from vqmoe_megatron.runtime.fused_parts import choose_parts
from vqmoe_megatron.train.records import check_records


@dataclass(frozen=True)
class CheckedRun:
    """A run that may start: the vocabulary filled in, layout, corpus and checkpoint verified."""

    config: RunConfig
    layout: ParallelLayout
    corpus: Corpus | ImageSet
    run_dir: RunDirectory
    resume_from: Path | None  # the checkpoint folder to go on from; None starts anew
    is_own: bool = True  # resume_from lies in this run's own directory
    remap_from: Path | None = None  # the checkpoint folder whose weights a new run starts with


def check_run(
    config: RunConfig, world_size: int, device: str, looks_for_checkpoint: bool = True
) -> CheckedRun:
    """Check layout, installed parts, corpus, tokenizer, output directory, free space, checkpoint.

    Hold the run directory's lock when it matters which checkpoint is found: an earlier attempt may
    still be saving. Ranks other than the first do not look; the first tells them.

    No communication; imports Megatron only where an installed part does.

    Raises:
        ValueError: for whatever is wrong, with what to do about it.
    """
    layout = check_layout(config, world_size, device)
    check_parts(config, device)
    corpus, config = _load_data(config)
    if config.finetune.is_on and looks_for_checkpoint:  # one rank for all: texts may be many files
        checked_texts(config.finetune)
    run_dir = RunDirectory(Path(config.train.output_dir))
    run_dir.create()
    if config.data.cache_dir is not None:
        num_samples = config.train.train_iters * config.train.global_batch_size
        name = order_name(corpus, config.model.seq_length, num_samples, config.train.seed)
        check_cache_dir(config.data.cache_dir, name)
    check_some_room(run_dir)
    folder, is_own = None, True
    if looks_for_checkpoint:
        folder, is_own = _checkpoint_to_load(config, run_dir)
    if folder is not None:
        check_format_version(folder, read_content(folder))
        if not config.vision.is_on:
            check_tokenizer(corpus, config.model.vocab_size, stored_tokenizer(folder))
    # A remapped run that has saved is a run like any other, and goes on from its own checkpoints.
    if folder is not None and config.finetune.is_on and not is_own:
        check_backbone(load_saved_recipe(folder / CONFIG_FILE), config)
        resume_from, remap_from = None, folder
    elif folder is not None and config.checkpoint.remap and not is_own:
        check_remap(load_saved_recipe(folder / CONFIG_FILE), config)
        resume_from, remap_from = None, folder
    else:
        resume_from, remap_from = folder, None
    if resume_from is not None:
        check_resumable(resume_from, config)
        if not config.vision.is_on:  # the order of images does not depend on the length
            _check_same_data_order(resume_from, config, corpus)
        _check_length(resume_from, config)
        _check_same_corpus(resume_from, corpus)
    if looks_for_checkpoint:
        own = folder if is_own else None
        start_iteration = iteration_of(resume_from) if resume_from else 0
        check_records(run_dir, config, own, start_iteration)
        if start_iteration < config.train.train_iters:  # else nothing is left to save
            check_checkpoint_room(config, run_dir)
    return CheckedRun(config, layout, corpus, run_dir, resume_from, is_own, remap_from)


def check_parts(config: RunConfig, device: str) -> None:
    """Load the parts of installed packages that the recipe names, and all metrics; write nothing.

    ``device`` is ``cpu`` or ``cuda``.

    Raises:
        ValueError: for one that cannot be loaded or does not implement its kind's interface, and
            for a fused kernel that the recipe asks for and that cannot be used here; with context
            parallelism for a task that does not cut its batches.
    """
    choose_parts(config, device)
    metric_table()
    for kind, of_kind in registry.KINDS.items():
        section, _, key = of_kind.key.partition(".")
        chosen = getattr(getattr(config, section, None), key, [])
        for name in [chosen] if isinstance(chosen, str) else chosen:
            if not registry.is_ours(kind, name):
                registry.load(kind, name)
    if (
        config.model.attention == "transformer_xl"
        and not registry.load("task", config.train.task).reads_streams
    ):
        raise ValueError(
            f"model.attention=transformer_xl: train.task={config.train.task} does not read "
            "parallel streams of a text, which its memory needs; use model.attention=standard, or "
            "let the task's rows go on where they ended and set reads_streams = True"
        )
    num_parts, task = config.parallel.context_parallel_size, config.train.task
    if num_parts > 1 and not registry.load("task", task).cuts_sequences:
        raise ValueError(
            f"context_parallel_size={num_parts}: train.task={task} gives every rank whole "
            "sequences; use 1, or let its forward_step cut batches with "
            "runtime.versions.batch_on_this_cp_rank and set cuts_sequences = True"
        )


def _load_data(config: RunConfig) -> tuple[Corpus | ImageSet, RunConfig]:
    """What the task reads, checked, and the recipe with what it leaves to the data filled in."""
    path = Path(config.data.path)
    if config.vision.is_on:
        images = load_image_set(path)
        check_images(config, images)
        return images, config
    corpus = load_corpus(path)
    check_tokenizer(corpus, config.model.vocab_size, None)
    if config.model.vocab_size is None:
        model = dataclasses.replace(config.model, vocab_size=corpus.vocab_size)
        config = dataclasses.replace(config, model=model)
    check_enough_text(config, corpus)
    return corpus, config


def check_images(config: RunConfig, images: ImageSet) -> None:
    """Refuse images of another size or other classes than the recipe's, and missing splits."""
    vision = config.vision
    for name, ours, theirs in (
        ("image_size", vision.image_size, images.image_size),
        ("num_channels", vision.num_channels, images.num_channels),
        ("num_classes", vision.num_classes, len(images.class_names)),
    ):
        if ours != theirs:
            raise ValueError(
                f"vision.{name}={ours}, but the images of {images.path} have {theirs}; set "
                f"vision.{name}={theirs}, or name other images with data.path"
            )
    images.split("train")
    if config.train.eval_iters:
        images.split(config.data.eval_split)


def check_enough_text(config: RunConfig, corpus: Corpus) -> None:
    """Refuse splits that are missing or hold less than one sample, or one scored token."""
    needed = {"train": config.model.seq_length + 1}
    if config.model.attention == "transformer_xl":  # every row has a part of its own to read
        needed["train"] = config.train.global_batch_size * config.model.seq_length + 1
    if config.train.eval_iters:
        needed[config.data.eval_split] = 2
    for name, num_tokens in needed.items():
        found = corpus.split(name).num_tokens
        if found < num_tokens:
            raise ValueError(
                f"split {name} of {corpus.path} has {found} tokens, this recipe needs {num_tokens} "
                "or more; lower model.seq_length or prepare a larger corpus"
            )


def _check_same_data_order(folder: Path, config: RunConfig, corpus: Corpus) -> None:
    """Refuse another length where it changes the order of the samples.

    Megatron shuffles all passes over a corpus together, so a longer run of several passes reads
    other samples from the start on. Streams are read in order, however long.
    """
    if config.model.attention == "transformer_xl":
        return
    stored = load_saved_recipe(folder / CONFIG_FILE).train
    ours, theirs = (train.train_iters * train.global_batch_size for train in (config.train, stored))
    pass_samples = (corpus.split("train").num_tokens - 1) // config.model.seq_length
    if config.finetune.is_on:
        return  # its passes follow from the seed alone
    if ours != theirs and max(ours, theirs) > pass_samples:
        raise ValueError(
            f"{folder} was trained with train.train_iters={stored.train_iters}, this recipe says "
            f"{config.train.train_iters}: {max(ours, theirs)} samples are more than one pass over "
            f"the corpus ({pass_samples}), and another number of them is another order of the "
            "data; set it back, or start in another train.output_dir"
        )


def _check_length(folder: Path, config: RunConfig) -> None:
    """Refuse a length that the checkpoint has already passed."""
    iteration, train_iters = iteration_of(folder), config.train.train_iters
    if train_iters < iteration:
        raise ValueError(
            f"train.train_iters={train_iters} is less than the {iteration} iterations that "
            f"{folder} has trained; set it to {iteration} or more, or start in another "
            "train.output_dir"
        )


def _check_same_corpus(folder: Path, corpus: Corpus) -> None:
    """Refuse another text: the data position of a checkpoint means nothing in it."""
    trained_on = hashlib.sha256((folder / CORPUS_COPY).read_bytes()).hexdigest()
    if trained_on != corpus.fingerprint:
        raise ValueError(
            f"{folder} was trained on another corpus than {corpus.path} (corpus.json sha256 "
            f"{trained_on[:12]} and {corpus.fingerprint[:12]}); set data.path back, or start in "
            "another train.output_dir"
        )


def _checkpoint_to_load(config: RunConfig, run_dir: RunDirectory) -> tuple[Path | None, bool]:
    """The run directory's own newest checkpoint, else that of ``checkpoint.load``, else None.

    With it, whether it is the run directory's own.
    """
    wanted = config.checkpoint.load
    if wanted is not None and not Path(wanted).exists():
        raise ValueError(f"checkpoint.load={wanted} does not exist")
    own = find_checkpoint(run_dir.path)
    if own is not None or wanted is None:
        return own, True
    found = find_checkpoint(Path(wanted))
    if found is None:
        raise ValueError(f"checkpoint.load={wanted} holds no complete checkpoint")
    return found, False
