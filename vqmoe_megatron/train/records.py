"""Whose records a run directory holds: a start goes on with its own run's and replaces no other's.

An attempt that was killed before its first checkpoint leaves a log that the next attempt of the
same run writes again. Every other file with the name of one that a run writes stays as it is, and
the start is refused: where nothing says that a run lived here, such a file is somebody else's.
"""

from __future__ import annotations

from pathlib import Path

from vqmoe_megatron.checkpoint.folder import differences_in_words, fixed_differences
from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import load_saved_recipe
from vqmoe_megatron.rundir.file_names import MLFLOW_FILE, RECORDS, STATUS_FILE
from vqmoe_megatron.rundir.run_directory import RunDirectory
from vqmoe_megatron.rundir.status import read_status


def is_same_run(run_dir: RunDirectory, config: RunConfig) -> bool:
    """Tell whether the last attempt in the directory was of this run, by its recipe.

    ``config`` with ``model.vocab_size`` filled in. Where and how it ran does not matter.
    """
    return not _differences(run_dir, config, starts_anew=True)


def check_records(
    run_dir: RunDirectory, config: RunConfig, own: Path | None, start_iteration: int
) -> None:
    """Refuse a start that would replace what it did not write, another run or somebody.

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
    records = [name for name in RECORDS if _has_content(run_dir.path / name)]
    if own is None and status is not None and status.iteration > start_iteration:
        raise ValueError(
            f"{run_dir.path / STATUS_FILE} says {status.state} at iteration {status.iteration}, "
            f"but {run_dir.checkpoints} holds no checkpoint to go on from; bring it back, choose "
            f"another train.output_dir, or move {', '.join((STATUS_FILE, *records))} away to start "
            "anew here"
        )
    if status is None and (run_dir.path / MLFLOW_FILE).exists():  # with a status, it is a run's
        records.append(MLFLOW_FILE)
    differences = _differences(run_dir, config, starts_anew=own is None)
    has_unknown_recipe = run_dir.config.exists() and (
        status is None or run_dir.config.name in differences
    )
    if own is not None and not run_dir.config.exists():
        return  # the checkpoint says whose the rest is
    if differences and (records or has_unknown_recipe):
        listed = "\n  ".join(f"{name}: {text}" for name, text in differences.items())
        present = [*records, *([run_dir.config.name] if run_dir.config.exists() else [])]
        advice = "set these back, choose another train.output_dir, or move the files away"
        if own is not None and run_dir.config.name in differences:
            advice = f"copy {own / run_dir.config.name} there if they are of its run, or {advice}"
        raise ValueError(
            f"{run_dir.path} holds the records of another run, or somebody's files, which this "
            f"start would replace ({', '.join(present)}):\n  {listed}\n{advice}"
        )


def _differences(run_dir: RunDirectory, config: RunConfig, starts_anew: bool) -> dict[str, str]:
    """What makes a run of ``config`` another than the last one here; empty for the same run."""
    if not run_dir.config.exists():
        return {run_dir.config.name: "missing, so these may be anybody's files"}
    try:
        stored = load_saved_recipe(run_dir.config)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        return {run_dir.config.name: f"damaged, or no recipe of this release: {reason}"}
    differing = fixed_differences(stored, config)
    if starts_anew:  # a checkpoint goes on with a corpus that was moved
        for name, theirs, ours in (
            ("data.path", stored.data.path, config.data.path),
            ("checkpoint.load", stored.checkpoint.load, config.checkpoint.load),
        ):
            if _place(theirs) != _place(ours):
                differing[name] = (theirs, ours)
        if stored.checkpoint.remap != config.checkpoint.remap:
            differing["checkpoint.remap"] = (stored.checkpoint.remap, config.checkpoint.remap)
    return differences_in_words(differing, config, "there")


def _place(path: str | None) -> Path | None:
    return None if path is None else Path(path).resolve()


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0
