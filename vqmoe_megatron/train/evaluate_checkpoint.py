"""Score a checkpoint on a split, at any layout: what training's validation does, by itself.

1. :func:`check_evaluation` judges by files alone, before any rank starts.
2. :func:`scores_of` builds the model on this rank, fills it with the checkpoint's weights and
   evaluates the task's windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vqmoe_megatron import registry
from vqmoe_megatron.checkpoint.content import check_format_version, read_content, readable
from vqmoe_megatron.checkpoint.folder import (
    CORPUS_COPY,
    find_checkpoint,
    iteration_of,
    read_json_object,
    stored_tokenizer,
)
from vqmoe_megatron.config import ParallelConfig, RunConfig
from vqmoe_megatron.config.recipe import apply_overrides, load_saved_recipe
from vqmoe_megatron.data.corpus import Corpus, check_tokenizer, load_corpus
from vqmoe_megatron.data.image_set import ImageSet, load_image_set
from vqmoe_megatron.data.labelled_texts import checked_texts
from vqmoe_megatron.plan.layout import ParallelLayout, check_layout, minimum_world_size
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.runtime.world import (
    RankVariables,
    build_process_groups,
    choose_device,
    join_world,
    leave_world,
)
from vqmoe_megatron.train.preflight import check_images, check_parts

ALL_WINDOWS = 10**9  # more than any split has
FREE_TRAIN_KEYS = ("train.micro_batch_size", "train.device", "train.deterministic")


@dataclass(frozen=True)
class Evaluation:
    """What may be evaluated; see :func:`check_evaluation`."""

    folder: Path  # iter_ folder
    config: RunConfig  # the checkpoint's, at the layout and on the split that were asked for
    layout: ParallelLayout
    corpus: Corpus | ImageSet
    max_windows: int | None  # None: the whole split

    @property
    def read_as(self) -> RunConfig:
        """The recipe that the task reads: train.eval_iters global batches are the windows."""
        num_rows = _num_rows(self.config) or 1
        num_batches = (self.max_windows or ALL_WINDOWS) // num_rows
        train = replace(self.config.train, eval_iters=num_batches, global_batch_size=num_rows)
        return replace(self.config, train=train)

    @property
    def iteration(self) -> int:
        """Of the checkpoint."""
        return iteration_of(self.folder)


def check_evaluation(
    checkpoint: Path,
    overrides: list[str],
    split: str,
    data: Path | None,
    stride_tokens: int | None,
    max_windows: int | None,
    num_ranks: int | None,
) -> Evaluation:
    """Judge everything by files alone; writes nothing.

    Args:
        checkpoint: a run directory or one iter_ folder.
        overrides: ``parallel.*``, and of ``train`` what decides how and not what is computed.
        split: valid or test.
        data: a corpus, or images, in the place of the checkpoint's; for a fine-tuned one a folder
            of texts.
        stride_tokens: between windows; None: their length.
        max_windows: so many, evenly spread, or of rows in order the first of each; None: all.
        num_ranks: None: the fewest that the layout fits on.

    Raises:
        ValueError: for whatever is wrong, with what to do about it.
    """
    folder = find_checkpoint(checkpoint)
    if folder is None:
        raise ValueError(f"{checkpoint} holds no complete checkpoint")
    check_format_version(folder, read_content(folder))
    for text in overrides:
        key = text.partition("=")[0].strip()
        if not (key.startswith("parallel.") or key in FREE_TRAIN_KEYS):
            raise ValueError(
                f"override {text!r}: a checkpoint is evaluated as it was trained; only parallel.*, "
                f"{', '.join(FREE_TRAIN_KEYS)} can be set, and --data, --split, --stride"
            )
    stored = replace(load_saved_recipe(folder / CONFIG_FILE), parallel=ParallelConfig())
    config = apply_overrides(stored, overrides)
    is_tuned = config.finetune.is_on
    if is_tuned and (stride_tokens or max_windows):
        raise ValueError(
            "--stride and --max-windows are for running text: a fine-tuned model is scored on "
            "every text of the split"
        )
    if data is not None and is_tuned:
        config = replace(config, finetune=replace(config.finetune, path=str(data), sha256=None))
    elif data is not None:
        config = replace(config, data=replace(config.data, path=str(data)))
    num_ranks = num_ranks or minimum_world_size(config)
    device, _ = choose_device(config.train.device)
    if stride_tokens is not None and stride_tokens > config.model.seq_length:
        raise ValueError(
            f"--stride {stride_tokens} must lie in 1..seq_length = {config.model.seq_length}, or "
            "tokens between windows would never be scored"
        )
    section = replace(config.data, eval_split=split, eval_stride_tokens=stride_tokens)
    config = replace(config, data=section)
    parallel = config.parallel
    num_rows = _num_rows(config)
    if num_rows and max_windows is not None and max_windows % num_rows:
        raise ValueError(
            f"--max-windows % train.global_batch_size != 0: {max_windows} % {num_rows} = "
            f"{max_windows % num_rows}; text is read in {num_rows} rows as in training, each with "
            f"its memory, and every row reads as many windows; use a multiple of {num_rows}"
        )
    # No step is taken: as many microbatches as every layout of these ranks takes.
    batch = config.train.micro_batch_size * num_ranks * parallel.pipeline_model_parallel_size
    batch = num_rows or batch
    train = replace(config.train, global_batch_size=batch, eval_iters=1)
    # Nothing of another engine's step is needed, and checkpoints are the same.
    train = replace(train, engine="megatron", zero_stage=0, offload_optimizer=False)
    config = replace(config, train=train)
    layout = check_layout(config, num_ranks, device)
    check_parts(config, device)
    corpus = _data(config, folder)
    return Evaluation(folder, config, layout, corpus, max_windows)


def _num_rows(config: RunConfig) -> int | None:
    """Rows that text is read in, where a memory belongs to a row; None: windows stand alone."""
    return config.train.global_batch_size if config.model.attention == "transformer_xl" else None


def evaluate_here(
    evaluation: Evaluation, variables: RankVariables, device: str
) -> tuple[str, dict[str, float]]:
    """Join the world, :func:`scores_of`, and leave it."""
    if device == "cpu":
        from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat

        install_cpu_compat()
    join_world(variables, device)
    try:
        build_process_groups(evaluation.layout)
        return scores_of(evaluation)
    finally:
        leave_world()


def scores_of(evaluation: Evaluation) -> tuple[str, dict[str, float]]:
    """What was evaluated, in words, and the task's scores; the same on every rank.

    In a joined world with its process groups. Communicates as training's validation does.

    Raises:
        ValueError: for tensors that do not fit the model, and a split that is not there.
    """
    from vqmoe_megatron.checkpoint.checksums import check_data_together
    from vqmoe_megatron.checkpoint.random_state import seed_generators
    from vqmoe_megatron.checkpoint.remap import load_weights
    from vqmoe_megatron.train.evaluate import evaluate

    config, layout = evaluation.config, evaluation.layout
    seed_generators(config.train.seed)
    task = registry.load("task", config.train.task)(evaluation.read_as, evaluation.corpus)
    engine = registry.load("engine", config.train.engine).build(config, layout, task)
    check_data_together(evaluation.folder)
    with readable(evaluation.folder):
        load_weights(evaluation.folder, engine.model, config)
    windows = task.evaluation_batches()
    scores = evaluate(engine, task, windows, layout.pipeline_model_parallel_size)
    return windows.description, scores


def _data(config: RunConfig, folder: Path) -> Corpus | ImageSet:
    """What ``data.path`` holds, fit for the checkpoint: in its tokens, or of its classes.

    Images are normalized by the figures that the model was trained with.
    """
    path = Path(config.data.path)
    if not config.vision.is_on:
        corpus = load_corpus(path)
        check_tokenizer(corpus, config.model.vocab_size, stored_tokenizer(folder))
        if config.finetune.is_on:
            checked_texts(config.finetune)
        else:
            corpus.split(config.data.eval_split)
        return corpus
    images, trained_on = load_image_set(path), read_json_object(folder / CORPUS_COPY)
    check_images(config, images)
    if list(images.class_names) != (known := trained_on["class_names"]):
        raise ValueError(
            f"the classes of {path} are {_in_short(images.class_names)}, the checkpoint's are "
            f"{_in_short(known)}: an answer would stand for another class; name images of the same "
            "classes, in the same order"
        )
    mean, std = (tuple(trained_on[name]) for name in ("channel_mean", "channel_std"))
    return replace(images, channel_mean=mean, channel_std=std)


def _in_short(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
