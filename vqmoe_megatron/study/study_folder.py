"""The directory of a study: its paths, its record of runs, and the rule that started runs stay.

    OUTPUT_DIR/study.yaml    copy of the study file; array tasks read it, so the file may be edited
    OUTPUT_DIR/recipe.yaml   copy of the recipe, which study.yaml names
    OUTPUT_DIR/runs.json     [{index, name, run_dir, point, overrides, num_ranks}]
    OUTPUT_DIR/indices.json  {name: index} of every run there ever was
    OUTPUT_DIR/runs/NAME/    ordinary run directories
    OUTPUT_DIR/logs/         what local runs and array tasks print
    OUTPUT_DIR/mlflow_parent.json, slurm_jobs.json
    OUTPUT_DIR/.run.lock     a POSIX lock: one command at a time starts runs of a study

A run keeps the index it once got: new points of an extended grid are numbered after the old ones,
so a task that waits in a queue still means the same run. An index whose point left the grid is
never given to another.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import yaml

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import flatten_config, load_saved_recipe
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.file_lock import LockHeld, LockWait, is_held, wait_for_lock
from vqmoe_megatron.rundir.file_names import CONFIG_FILE
from vqmoe_megatron.rundir.own_outputs import refuse_foreign
from vqmoe_megatron.rundir.waiting import tell_nobody
from vqmoe_megatron.study.planned_run import PlannedRun, decides_training
from vqmoe_megatron.study.study_file import StudyFile, study_section

LISTED_RUNS = 5
PATIENCE_SECONDS = 1.0  # `vqmoe study status` holds the lock for an instant when it asks


class StudyFolder:
    """Every path of ``study.output_dir``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs_file = path / "runs.json"  # the runs of the study, for reports
        self.indices_file = path / "indices.json"  # the index of every run ever recorded
        # The study file and the recipe as they were when runs were last started or submitted.
        self.study_copy, self.recipe_copy = path / "study.yaml", path / "recipe.yaml"
        self.logs = path / "logs"  # one per run
        self.mlflow_parent = path / "mlflow_parent.json"  # {"uri", "experiment", "run_id"}
        self.slurm_jobs = path / "slurm_jobs.json"  # ids and names of submitted arrays
        self.lock_file = path / ".run.lock"

    def indices(self, names: Iterable[str]) -> dict[str, int]:
        """Return the index of every name: the one it has, else the next free one."""
        known = self.recorded_indices()
        following = max(known.values(), default=-1) + 1
        found: dict[str, int] = {}
        for name in names:
            if name in known:
                found[name] = known[name]
            else:
                found[name], following = following, following + 1
        return found

    def recorded_indices(self) -> dict[str, int]:
        """Return the index of every run ever recorded, those that left the grid among them.

        Raises:
            ValueError: for a damaged record.
        """
        found: dict[str, int] = {}
        for file in (self.runs_file, self.indices_file):
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                if file == self.runs_file:
                    content = {row["name"]: row["index"] for row in content}
                found |= {str(name): int(index) for name, index in content.items()}
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{file} is damaged or no record of a study ({error}); move it away to have it "
                    "written again, or choose another study.output_dir"
                ) from error
        return found

    def check_ours(self, file: StudyFile) -> None:
        """Refuse a directory of another study, and files with our names that no study wrote.

        Raises:
            ValueError: naming them, or for a copy that cannot be read.
        """
        if not self.recorded_indices():  # written before the copies: no study has been here
            copies = [self.study_copy]
            if file.recipe != self.recipe_copy:
                copies.append(self.recipe_copy)
            for copy in copies:
                if os.path.lexists(copy):
                    refuse_foreign(copy, "vqmoe study")
            return
        if not self.study_copy.exists():
            return
        try:
            name = study_section(self.study_copy)["name"]
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{self.study_copy} is damaged, so it is not known whose directory this is; "
                "move it away to have it written again"
            ) from error
        if name != file.name:
            raise ValueError(
                f"study.output_dir={self.path} holds the study {name!r}, not {file.name!r}; choose "
                "another output_dir"
            )

    def create(self, file: StudyFile, runs: Sequence[PlannedRun]) -> None:
        """Write the copies and the record of runs, each atomically.

        Raises:
            ValueError: when the directory cannot be written, or is another study's.
        """
        self.check_ours(file)
        indices = self.indices(run.name for run in runs)
        rows = [
            {
                "index": indices[run.name],
                "name": run.name,
                "run_dir": str(run.run_dir),
                "point": dict(run.point),
                "overrides": list(run.overrides),
                "num_ranks": run.num_ranks,
            }
            for run in runs
        ]
        rows.sort(key=lambda row: row["index"])
        study = {**file.content["study"], "recipe": str(self.recipe_copy)}
        content = yaml.safe_dump({**file.content, "study": study}, sort_keys=False)
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            (self.path / "runs").mkdir(exist_ok=True)
            ever = {**self.recorded_indices(), **indices}
            replace_file(self.indices_file, json.dumps(ever, indent=1) + "\n")
            if file.recipe != self.recipe_copy:
                replace_file(self.recipe_copy, file.recipe.read_text(encoding="utf-8"))
            replace_file(self.study_copy, content)
            replace_file(self.runs_file, json.dumps(rows, indent=1) + "\n")
        except OSError as error:
            raise ValueError(
                f"study.output_dir={self.path} cannot be written: {error.strerror}; choose another"
            ) from error


def check_started_runs(file: StudyFile, runs: Iterable[PlannedRun]) -> None:
    """Refuse a study file that would change a run that has started; new points are welcome.

    Raises:
        ValueError: naming the runs and their keys.
    """
    changed: dict[str, list[str]] = {}
    for run in runs:
        stored = run.run_dir / CONFIG_FILE
        if stored.is_file():
            differences = changed_settings(load_saved_recipe(stored), run.config)
            if differences:
                changed[run.name] = differences
    if not changed:
        return
    lines = [f"  - {name}: {'; '.join(keys)}" for name, keys in list(changed.items())[:LISTED_RUNS]]
    if len(changed) > LISTED_RUNS:
        lines.append(f"  - and {len(changed) - LISTED_RUNS} more")
    raise ValueError(
        f"study {file.path} now describes {len(changed)} runs that have started differently:\n"
        + "\n".join(lines)
        + "\nset it back (new points may be added), or take another study.output_dir"
    )


def changed_settings(stored: RunConfig, planned: RunConfig) -> list[str]:
    """Return ``key: was A, is now B`` for every setting that decides what is trained."""
    before, after = (
        flatten_config(replace(config, code_memory=config.code_memory.in_effect))
        for config in (stored, planned)
    )
    return [
        f"{key}: was {before[key]}, is now {value}"
        for key, value in after.items()
        if value != before[key]
        and decides_training(key)
        and not (key == "model.vocab_size" and value is None)  # filled in from the corpus
    ]


@contextmanager
def study_lock(folder: StudyFolder) -> Iterator[None]:
    """Hold the lock of a study's directory, which is made if it is not there.

    The kernel lets go of it when its process ends, however it ends. The runs do not inherit it.

    Raises:
        ValueError: when another process holds it, or the directory cannot be written.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        file = folder.lock_file.open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"study.output_dir={folder.path} cannot be written: {error.strerror}; choose another"
        ) from error
    with file:
        try:
            wait_for_lock(file, fcntl.lockf, LockWait(PATIENCE_SECONDS, tell_nobody))
        except LockHeld as held:
            raise ValueError(
                f"runs of study {folder.path} are being started by {held.holder}; wait for it, or "
                "stop it first"
            ) from held
        except OSError as error:
            raise ValueError(f"{folder.lock_file} cannot be locked: {error.strerror}") from error
        yield


def is_study_locked(folder: StudyFolder) -> bool:
    """Tell whether another process holds the lock; never makes a file."""
    try:
        return is_held(folder.lock_file, fcntl.lockf)
    except OSError:  # one we may not ask
        return False
