"""Which checkpoint a run starts from, and whether it may: files only, before any rank starts.

- ``checkpoints/iter_0000100/``: complete, or not there; with ``run_config.yaml``, ``layout.json``
  and ``corpus.json``, what it was trained with, and ``checksums.json`` of all files
- ``checkpoints/latest_checkpointed_iteration.txt``: names the newest; written last
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_saved_recipe
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.rundir.file_names import CONFIG_FILE, TRACKER_FILE
from vqmoe_megatron.rundir.tracker import named_iteration, tracker_text

NEXT_TRACKER_FILE = f"{TRACKER_FILE}.tmp"  # written before a checkpoint gets its name
FORMAT_FILE = "metadata.json"  # Megatron's; the last file that is written
LAYOUT_FILE = "layout.json"
CORPUS_COPY = "corpus.json"
FOLDER_PATTERN = re.compile(r"^iter_(\d{7})$")
# Recipe settings that a run may change when it is resumed: they decide how, not what is computed.
FREE_SETTINGS = (
    "optimizer.overlap_grad_reduce",
    "optimizer.overlap_param_gather",
    "optimizer.use_distributed_optimizer",
    "vq.execution",
    "vq.table_per_step",
    "vq.overlap_table",
    "code_memory.exchange",
    "router.eval_topk",
    # What: but frozen codes are re-opened, or frozen now, this way.
    "vq.freeze_after_steps",
    "code_memory.freeze_after_steps",
    "finetune.path",  # finetune.sha256 says which texts
)
FREE_PREFIXES = ("model.recompute_",)
# What checkpoint.remap can change.
REMAPPED_SETTINGS = ("model.num_moe_experts", "vq.num_codes")
# Of section train: what the data order and the learning-rate schedule count in.
FIXED_TRAIN_SETTINGS = ("global_batch_size", "seed")
DECAY = "optimizer.lr_decay_iters"


def find_checkpoint(path: Path) -> Path | None:
    """Return the ``iter_`` folder meant by a run directory, its checkpoints folder, or the folder.

    None when there is no complete checkpoint.

    A kill between naming a checkpoint and naming it in the tracker leaves the next tracker beside
    it, which then counts.

    Raises:
        ValueError: when the tracker is damaged, names a folder that is not there, or is missing
            beside checkpoints, and for a folder that has lost its ``metadata.json``.
    """
    if FOLDER_PATTERN.match(path.name):
        _check_described(path)
        return path if (path / FORMAT_FILE).exists() else None
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    tracker, next_tracker = folder / TRACKER_FILE, folder / NEXT_TRACKER_FILE
    complete = complete_checkpoints(folder)
    if not tracker.exists():
        named = _tracked_folder(next_tracker) if next_tracker.is_file() else None
        if named in complete:
            return folder / str(named)
        if not _checkpoint_names(folder):
            return None
    ways = "none is left: copy them again, or move the file and every iter_ folder away"
    advice = (
        f"write the iteration of a complete one into {tracker.name}: {', '.join(complete) or ways}"
    )
    if not tracker.exists():
        raise ValueError(
            f"{tracker} is missing beside {', '.join(_checkpoint_names(folder))}; {advice}"
        )
    named = _tracked_folder(tracker)
    if named is None:
        text = _first_text(tracker)
        raise ValueError(f"{tracker} holds {text!r} instead of an iteration number; {advice}")
    _check_described(folder / named)
    if named not in complete:
        raise ValueError(
            f"{tracker} names {named}, but that checkpoint is missing or incomplete; {advice}"
        )
    return folder / named


def complete_checkpoints(folder: Path) -> list[str]:
    """Return the names of the complete checkpoints in ``folder``, oldest first."""
    return [name for name in _checkpoint_names(folder) if (folder / name / FORMAT_FILE).exists()]


def damaged(path: Path, problem: str) -> ValueError:
    """Return the error about an ``iter_`` folder, or a file of it, with the ways on."""
    return ValueError(f"damaged checkpoint: {path} {problem}; {ways_on(path)}")


def ways_on(path: Path) -> str:
    """What to do about a damaged ``iter_`` folder, or a file of it."""
    folder = path if FOLDER_PATTERN.match(path.name) else path.parent
    ways = f"copy {path.name} again from where it is whole"
    others = [name for name in complete_checkpoints(folder.parent) if name != folder.name]
    if not others:
        return f"{ways}, or use another checkpoint; no other one is in {folder.parent}"
    before = [name for name in others if name < folder.name] or others
    other = folder.parent / before[-1]
    return (
        f"{ways}, or use {other} instead, which a run goes on from when {iteration_of(other)} is "
        f"written into {TRACKER_FILE}"
    )


def iteration_of(folder: Path) -> int:
    """Return the iteration of an ``iter_`` folder, by its name."""
    return int(folder.name.removeprefix("iter_"))


def _check_described(folder: Path) -> None:
    """Refuse files without a description: a save names its folder when all is there."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FORMAT_FILE).exists():
        raise damaged(folder / FORMAT_FILE, "is missing")


def _checkpoint_names(folder: Path) -> list[str]:
    """Every ``iter_`` folder, complete or not; none where there is no folder to look into."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if FOLDER_PATTERN.match(entry.name))


def _tracked_folder(tracker: Path) -> str | None:
    """The folder that a tracker file names; None when it holds no number."""
    iteration = named_iteration(_first_text(tracker))
    return None if iteration is None else f"iter_{iteration:07d}"


def _first_text(tracker: Path) -> str:
    try:
        return tracker_text(tracker)
    except OSError as error:
        raise ValueError(f"{tracker} cannot be read: {error.strerror}") from error


def stored_tokenizer(folder: Path) -> dict[str, Any]:
    """Return the description of the tokenizer that the checkpoint was trained with.

    Raises:
        ValueError: when the checkpoint holds none.
    """
    description = read_json_object(folder / CORPUS_COPY).get("tokenizer")
    if not isinstance(description, dict):
        raise ValueError(f"{folder / CORPUS_COPY} does not describe a tokenizer")
    return description


def written_at(folder: Path) -> dict[str, Any]:
    """Return the layout that wrote the checkpoint, as the fields of ``ParallelLayout``.

    Raises:
        ValueError: when the checkpoint does not say.
    """
    return read_json_object(folder / LAYOUT_FILE)


def has_same_layout(folder: Path, layout: ParallelLayout) -> bool:
    """Tell whether the checkpoint was written by the same number of ranks in the same places."""
    return written_at(folder) == asdict(layout)


def fixed_differences(stored: RunConfig, config: RunConfig) -> dict[str, tuple[object, object]]:
    """Return the settings that make another model, data order or schedule: name -> both values.

    Both with ``model.vocab_size`` filled in. Where and how a run computes does not matter.
    """
    theirs, ours = _fixed_settings(stored), _fixed_settings(config)
    return {name: (theirs[name], ours[name]) for name in ours if ours[name] != theirs[name]}


def check_resumable(folder: Path, config: RunConfig) -> None:
    """Raise ``ValueError`` when the checkpoint belongs to another model, data order or schedule.

    The layout may be another one. ``config`` with ``model.vocab_size`` filled in.
    """
    differences = fixed_differences(load_saved_recipe(folder / CONFIG_FILE), config)
    if not differences:
        return
    advice = "set these back, or start in another train.output_dir"
    if set(differences) <= set(REMAPPED_SETTINGS):
        advice += (
            "; to begin a new run from these weights with other codes or experts, use an empty "
            f"train.output_dir with checkpoint.load={folder} checkpoint.remap=true"
        )
    words = differences_in_words(differences, config, "checkpoint")
    listed = "\n  ".join(f"{name}: {text}" for name, text in words.items())
    raise ValueError(
        f"{folder} cannot be resumed with this recipe:\n  {listed}\na checkpoint goes on with the "
        f"same model, data order and schedule, at any layout; {advice}"
    )


def differences_in_words(
    differences: Mapping[str, tuple[object, object]], config: RunConfig, where: str
) -> dict[str, str]:
    """Return setting -> both values in words, what is stored named ``where``.

    A schedule that only follows ``train.train_iters`` says how the stored one is kept.
    """
    words = {
        name: f"{where} {theirs!r}, recipe {ours!r}" for name, (theirs, ours) in differences.items()
    }
    if DECAY in words and config.optimizer.lr_decay_iters is None:
        kept = f"{DECAY}={differences[DECAY][0]}"
        words[DECAY] += (
            f" (not set, so it follows train.train_iters; {kept} keeps the old schedule: behind "
            "it the learning rate stays where that one ended)"
        )
    return words


def read_json_object(path: Path) -> dict[str, Any]:
    """Read one of the checkpoint's small files.

    Raises:
        ValueError: when it cannot be read or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if text else None
    except (OSError, ValueError) as error:
        raise damaged(path, f"cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise damaged(path, "holds no object" if text else "is empty")
    return content


def _fixed_settings(config: RunConfig) -> dict[str, object]:
    model, steps = config.model, config.train.train_iters
    router = config.router.for_run(model.moe_router, model.num_moe_experts, steps)
    config = replace(config, code_memory=config.code_memory.in_effect, router=router)
    settings = {
        f"{section}.{spec.name}": getattr(getattr(config, section), spec.name)
        for section in ("model", "vq", "router", "code_memory", "finetune", "vision", "optimizer")
        for spec in fields(getattr(config, section))
    }
    settings |= {f"train.{name}": getattr(config.train, name) for name in FIXED_TRAIN_SETTINGS}
    # Unset, it follows train.train_iters, and another length is another schedule.
    settings[DECAY] = config.optimizer.lr_decay_iters or config.train.train_iters
    return {
        name: value
        for name, value in settings.items()
        if name not in FREE_SETTINGS and not name.startswith(FREE_PREFIXES)
    }
