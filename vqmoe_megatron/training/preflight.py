"""Everything that can refuse a run, before any rank trains."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.data.corpus import Corpus, check_tokenizer, load_corpus
from vqmoe_megatron.plan.layout import ParallelLayout, check_layout
from vqmoe_megatron.tracking.run_status import read_status
from vqmoe_megatron.training.checkpoint_folder import (
    CORPUS_COPY,
    check_resumable,
    find_checkpoint,
    stored_tokenizer,
)
from vqmoe_megatron.training.run_directory import RunDirectory

MINIMUM_FREE_BYTES = 64 * 1024**2  # less than this and not even logs and a small checkpoint fit


@dataclass(frozen=True)
class CheckedRun:
    """A run that may start: the vocabulary filled in, layout, corpus and checkpoint verified."""

    config: RunConfig
    layout: ParallelLayout
    corpus: Corpus
    run_dir: RunDirectory
    resume_from: Path | None  # the checkpoint folder to load; None starts from scratch


def check_run(config: RunConfig, world_size: int, device: str) -> CheckedRun:
    """Check layout, corpus, tokenizer, output directory, free space and checkpoint.

    No communication; imports neither torch.distributed nor Megatron.

    Raises:
        ValueError: for whatever is wrong, with what to do about it.
    """
    layout = check_layout(config, world_size, device)
    corpus = load_corpus(Path(config.data.path))
    check_tokenizer(corpus, config.model.vocab_size, None)
    if config.model.vocab_size is None:
        model = dataclasses.replace(config.model, vocab_size=corpus.vocab_size)
        config = dataclasses.replace(config, model=model)
    corpus.split("train")
    if config.train.eval_iters:
        corpus.split(config.data.eval_split)
    run_dir = RunDirectory(Path(config.train.output_dir))
    run_dir.create()
    free_bytes = shutil.disk_usage(run_dir.path).free
    if free_bytes < MINIMUM_FREE_BYTES:
        raise ValueError(
            f"train.output_dir={run_dir.path} has {free_bytes / 1024**2:.0f} MiB free, less than "
            f"{MINIMUM_FREE_BYTES / 1024**2:.0f} MiB; free some or choose another directory"
        )
    resume_from = _checkpoint_to_load(config, run_dir)
    if resume_from is not None:
        check_tokenizer(corpus, config.model.vocab_size, stored_tokenizer(resume_from))
        check_resumable(resume_from, config, layout)
        _check_same_corpus(resume_from, corpus)
    read_status(run_dir.path)  # a damaged one is refused here, not in the ranks
    return CheckedRun(config, layout, corpus, run_dir, resume_from)


def _check_same_corpus(folder: Path, corpus: Corpus) -> None:
    """Refuse another text: the data position of a checkpoint means nothing in it."""
    trained_on = hashlib.sha256((folder / CORPUS_COPY).read_bytes()).hexdigest()
    if trained_on != corpus.fingerprint:
        raise ValueError(
            f"{folder} was trained on another corpus than {corpus.path} (corpus.json sha256 "
            f"{trained_on[:12]} and {corpus.fingerprint[:12]}); set data.path back, or start in "
            "another train.output_dir"
        )


def _checkpoint_to_load(config: RunConfig, run_dir: RunDirectory) -> Path | None:
    """The run directory's own newest checkpoint, else that of ``checkpoint.load``, else None."""
    wanted = config.checkpoint.load
    if wanted is not None and not Path(wanted).exists():
        raise ValueError(f"checkpoint.load={wanted} does not exist")
    found = find_checkpoint(run_dir.path)
    if found is None and wanted is not None:
        found = find_checkpoint(Path(wanted))
        if found is None:
            raise ValueError(f"checkpoint.load={wanted} holds no complete checkpoint")
    return found
