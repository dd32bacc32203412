"""A study as its commands see it: the file, its directory, its runs by index and name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.data.corpus import load_corpus
from vqmoe_megatron.data.image_set import load_image_set
from vqmoe_megatron.study.planned_run import PlannedRun, StudyPlanner
from vqmoe_megatron.study.study_file import StudyFile, listed, read_study_file
from vqmoe_megatron.study.study_folder import StudyFolder, check_started_runs


@dataclass(frozen=True)
class Study:
    """``runs`` by index: all of them, or the one that was asked for."""

    file: StudyFile
    folder: StudyFolder
    runs: dict[int, PlannedRun]

    @property
    def log_of(self) -> dict[int, Path]:
        """Where a local run's output goes, by index."""
        return {index: self.folder.logs / f"{run.name}.log" for index, run in self.runs.items()}

    def select(self, wanted: Sequence[str]) -> dict[int, PlannedRun]:
        """Return the runs named by index or name, all for an empty list.

        Raises:
            ValueError: for one that is not in the study, with the nearest names.
        """
        if not wanted:
            return self.runs
        by_name = {run.name: index for index, run in self.runs.items()}
        chosen: set[int] = set()
        for text in wanted:
            index = int(text) if text.isdigit() else by_name.get(text)
            if index not in self.runs:
                near = difflib.get_close_matches(text, by_name, n=3, cutoff=0.5)
                hint = f"did you mean {' or '.join(near)}?" if near else "see vqmoe study list"
                raise ValueError(
                    f"{text!r} is no run of study {self.file.path}, by index or name: {hint}"
                )
            chosen.add(index)
        return {index: run for index, run in self.runs.items() if index in chosen}

    def check_started(self) -> None:
        """Refuse a file that would change a started run, or that has another study's directory."""
        self.folder.check_ours(self.file)
        check_started_runs(self.file, self.runs.values())

    def check_corpora(self) -> None:
        """Refuse a missing or cut corpus before any run starts; reads sizes, not tokens."""
        configs = [run.config for run in self.runs.values()]
        for path, is_text in dict.fromkeys((c.data.path, not c.vision.is_on) for c in configs):
            (load_corpus if is_text else load_image_set)(Path(path))

    def start(self) -> None:
        """Refuse changed runs, then write the study's directory; before any work starts.

        For a study that was loaded whole.

        Raises:
            ValueError: see :func:`check_started_runs` and :meth:`StudyFolder.create`.
        """
        self.check_started()
        if self.folder.indices(run.name for run in self.runs.values()) != {
            run.name: index for index, run in self.runs.items()
        }:
            raise ValueError(
                f"the runs of study {self.file.path} were numbered by another command just now; "
                "start this one again"
            )
        self.folder.create(self.file, list(self.runs.values()))


def load_study(path: Path) -> Study:
    """Read a study file and check every run.

    Raises:
        ValueError: every problem of the file, or else of all its runs, in one message.
    """
    file = read_study_file(path)
    folder = StudyFolder(file.output_dir)
    runs = {run.name: run for run in StudyPlanner(file).plan_all()}
    by_index = sorted((index, name) for name, index in folder.indices(runs).items())
    return Study(file, folder, {index: runs[name] for index, name in by_index})


def load_study_run(path: Path, index: int) -> Study:
    """Read a study file and check one run only.

    Raises:
        ValueError: for an index that the study does not have, and what :func:`load_study` refuses.
    """
    file = read_study_file(path)
    folder = StudyFolder(file.output_dir)
    indices = folder.indices(point.name for point in file.points)
    for point in file.points:
        if indices[point.name] == index:
            try:
                return Study(file, folder, {index: StudyPlanner(file).plan(point)})
            except ValueError as error:
                raise ValueError(listed(path, [f"{point.name}: {error}"])) from error
    for name, retired in folder.recorded_indices().items():
        if retired == index:
            raise ValueError(
                f"--index {index} was {name}, which is no longer in the grid of study {path}; see "
                f"vqmoe study list {path}"
            )
    known = sorted(indices.values())
    raise ValueError(
        f"--index {index} is not in study {path}: it has {len(known)} runs, indices "
        f"{known[0]} to {known[-1]}; see vqmoe study list {path}"
    )
