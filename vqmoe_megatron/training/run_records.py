"""Whose records a run directory holds: a start goes on with its own run's and replaces no other's.

An attempt that was killed before its first checkpoint leaves a log that the next attempt of the
same run writes again. Anything else in the directory stays as it is, and the start is refused.
"""

from __future__ import annotations

from pathlib import Path

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.recipe import load_recipe
from vqmoe_megatron.tracking.metrics_log import METRICS_FILE, SYSTEM_METRICS_FILE
from vqmoe_megatron.tracking.run_status import STATUS_FILE, read_status
from vqmoe_megatron.training.checkpoint_folder import fixed_differences
from vqmoe_megatron.training.run_directory import RunDirectory

LOGS = (METRICS_FILE, SYSTEM_METRICS_FILE)  # cut back to where a start begins


def is_same_run(run_dir: RunDirectory, config: RunConfig) -> bool:
    """Tell whether the last attempt in the directory was of this run, by its recipe.

    ``config`` with ``model.vocab_size`` filled in. Where and how it ran does not matter.
    """
    return not _differences(run_dir, config)


def check_records(
    run_dir: RunDirectory, config: RunConfig, own: Path | None, start_iteration: int
) -> None:
    """Refuse a start that would replace what another run left in the directory.

    Args:
        run_dir: where the run writes.
        config: with ``model.vocab_size`` filled in.
        own: the directory's own checkpoint, which the start goes on from; None when it starts anew
            or from another directory's.
        start_iteration: where it begins.

    Raises:
        ValueError: naming what is there and the ways on.
    """
    status = read_status(run_dir.path)
    if own is None and status is not None and status.iteration > start_iteration:
        raise ValueError(
            f"{run_dir.path / STATUS_FILE} says {status.state} at iteration {status.iteration}, "
            f"but {run_dir.checkpoints} holds no checkpoint to go on from; bring it back, choose "
            f"another train.output_dir, or move {', '.join((STATUS_FILE, *LOGS))} away to start "
            "anew here"
        )
    logs = [name for name in LOGS if _has_content(run_dir.path / name)]
    if own is not None:  # which has this recipe, so that only a log of another run can be wrong
        stored = _last_recipe(run_dir)
        differences = {} if stored is None else _as_text(fixed_differences(stored, config))
    else:
        differences = _differences(run_dir, config)
    is_foreign = bool(logs) or (status is None and run_dir.config.exists())
    if is_foreign and differences:
        listed = "\n  ".join(f"{name}: {text}" for name, text in differences.items())
        raise ValueError(
            f"{run_dir.path} holds the records of another run, which this start would replace "
            f"({', '.join([*logs, run_dir.config.name])}):\n  {listed}\nset these back, choose "
            "another train.output_dir, or move the files away"
        )


def _differences(run_dir: RunDirectory, config: RunConfig) -> dict[str, str]:
    """What makes a run of ``config`` another than the last one here; empty for the same run."""
    stored = _last_recipe(run_dir)
    if stored is None:
        return {run_dir.config.name: "missing, or not of this release"}
    differing = fixed_differences(stored, config)
    for name, theirs, ours in (
        ("data.path", stored.data.path, config.data.path),
        ("checkpoint.load", stored.checkpoint.load, config.checkpoint.load),
    ):
        if _place(theirs) != _place(ours):
            differing[name] = (theirs, ours)
    if stored.checkpoint.remap != config.checkpoint.remap:
        differing["checkpoint.remap"] = (stored.checkpoint.remap, config.checkpoint.remap)
    return _as_text(differing)


def _as_text(differences: dict[str, tuple[object, object]]) -> dict[str, str]:
    return {
        name: f"there {theirs!r}, recipe {ours!r}" for name, (theirs, ours) in differences.items()
    }


def _last_recipe(run_dir: RunDirectory) -> RunConfig | None:
    try:
        return load_recipe(run_dir.config, [])
    except ValueError:  # not there, or of a release with other keys
        return None


def _place(path: str | None) -> Path | None:
    return None if path is None else Path(path).resolve()


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
