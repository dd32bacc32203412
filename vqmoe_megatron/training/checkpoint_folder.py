"""Which checkpoint a run starts from, and whether it may: files only, before any rank starts.

- ``checkpoints/iter_0000100/``: complete, or not there; with ``run_config.yaml``, ``layout.json``
  and ``corpus.json``, what it was trained with
- ``checkpoints/latest_checkpointed_iteration.txt``: names the newest; written last
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.recipe import load_recipe

TRACKER_FILE = "latest_checkpointed_iteration.txt"
CONFIG_FILE = "run_config.yaml"
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
)
FREE_PREFIXES = ("model.recompute_",)
# What checkpoint.remap can change.
REMAPPED_SETTINGS = ("model.num_moe_experts", "vq.num_codes")
# Of section train: what the data order and the learning-rate schedule count in.
FIXED_TRAIN_SETTINGS = ("global_batch_size", "seed")


def find_checkpoint(path: Path) -> Path | None:
    """Return the ``iter_`` folder meant by a run directory, its checkpoints folder, or the folder.

    None when there is no complete checkpoint.

    Raises:
        ValueError: when the tracker is damaged or names a folder that is not there.
    """
    if FOLDER_PATTERN.match(path.name):
        return path if (path / "metadata.json").exists() else None
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    tracker = folder / TRACKER_FILE
    if not tracker.exists():
        return None
    text = tracker.read_bytes()[:80].decode(errors="replace").strip()
    advice = (
        f"write the iteration of a complete one into {tracker.name}: "
        f"{', '.join(complete_checkpoints(folder)) or 'none is left, so remove the file'}"
    )
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{tracker} holds {text!r} instead of an iteration number; {advice}")
    found = folder / f"iter_{int(text):07d}"
    if not (found / "metadata.json").exists():
        raise ValueError(
            f"{tracker} names {found.name}, but that checkpoint is missing or incomplete; {advice}"
        )
    return found


def complete_checkpoints(folder: Path) -> list[str]:
    """Return the names of the complete checkpoints in ``folder``, oldest first."""
    return sorted(
        entry.name
        for entry in folder.iterdir()
        if FOLDER_PATTERN.match(entry.name) and (entry / "metadata.json").exists()
    )


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


def check_resumable(folder: Path, config: RunConfig) -> None:
    """Raise ``ValueError`` when the checkpoint belongs to another model, data order or schedule.

    The layout may be another one. ``config`` with ``model.vocab_size`` filled in.
    """
    ours, theirs = _fixed_settings(config), _fixed_settings(load_recipe(folder / CONFIG_FILE, []))
    differences = [name for name, value in ours.items() if value != theirs[name]]
    if not differences:
        return
    advice = "set these back, or start in another train.output_dir"
    if set(differences) <= set(REMAPPED_SETTINGS):
        advice += (
            "; to begin a new run from these weights with other codes or experts, use an empty "
            f"train.output_dir with checkpoint.load={folder} checkpoint.remap=true"
        )
    listed = "\n  ".join(
        f"{name}: checkpoint {theirs[name]!r}, recipe {ours[name]!r}" for name in differences
    )
    raise ValueError(
        f"{folder} cannot be resumed with this recipe:\n  {listed}\na checkpoint goes on with the "
        f"same model, data order and schedule, at any layout; {advice}"
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Read one of the checkpoint's small files.

    Raises:
        ValueError: when it cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"damaged checkpoint: {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"damaged checkpoint: {path} holds no object")
    return content


def _fixed_settings(config: RunConfig) -> dict[str, object]:
    settings = {
        f"{section}.{spec.name}": getattr(getattr(config, section), spec.name)
        for section in ("model", "vq", "optimizer")
        for spec in fields(getattr(config, section))
    }
    settings |= {f"train.{name}": getattr(config.train, name) for name in FIXED_TRAIN_SETTINGS}
    # Unset, it follows train.train_iters, and another length is another schedule.
    settings["optimizer.lr_decay_iters"] = (
        config.optimizer.lr_decay_iters or config.train.train_iters
    )
    return {
        name: value
        for name, value in settings.items()
        if name not in FREE_SETTINGS and not name.startswith(FREE_PREFIXES)
    }
