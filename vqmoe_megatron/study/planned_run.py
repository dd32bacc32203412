"""One point of a study's grid becomes one checked training run.

1. Products such as ``vq.num_codes=4 * experts`` become numbers.
2. The recipe is loaded with the study's overrides and the point's.
3. The study's rule sets ``train.train_iters`` (see budget.py), the study the directories.
4. The layout is checked for the run's number of ranks.

The result's ``overrides`` lead from the recipe to its ``config``: ``vqmoe pretrain RECIPE
OVERRIDES`` is the same run by hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.recipe import (
    LEGAL_TYPES,
    flatten_config,
    holds_text,
    load_recipe,
    text_override,
)
from vqmoe_megatron.plan.layout import check_layout, minimum_world_size
from vqmoe_megatron.study.axes import AXIS_KEYS, RANKS_KEY, Point
from vqmoe_megatron.study.budget import rule_train_iters, tokens_per_step
from vqmoe_megatron.study.override_texts import key_of
from vqmoe_megatron.study.study_file import StudyFile, listed
from vqmoe_megatron.track.mlflow.sqlite_uri import sqlite_uri

PRODUCT = re.compile(r"\s*(\d+)\s*\*\s*([A-Za-z_.]+)\s*")
PROBLEM_NAMES = 3  # runs that are named with a problem they share
# Where and how long one attempt runs and what it reports to; not what is trained.
FREE_KEYS = (
    "data.cache_dir",
    "train.output_dir",
    "train.exit_interval",
    "train.exit_duration_in_mins",
)
FREE_SECTION = "tracking."


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study that has passed every check that needs neither ranks nor a corpus."""

    name: str
    point: Mapping[str, int | float | str | bool]
    overrides: tuple[str, ...]
    num_ranks: int
    config: RunConfig

    @property
    def run_dir(self) -> Path:
        """An ordinary run directory."""
        return Path(self.config.train.output_dir)

    @property
    def num_tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.config.train.train_iters * tokens_per_step(self.config)


class StudyPlanner:
    """Plans the points of one study file; what they share is loaded once."""

    def __init__(self, file: StudyFile) -> None:
        self.file = file

    @cached_property
    def _recipe_values(self) -> dict[str, object]:
        return dict(flatten_config(load_recipe(self.file.recipe, [])))

    @cached_property
    def _budget_config(self) -> RunConfig:
        """The recipe with ``set`` alone, whose length is everybody's budget."""
        return load_recipe(self.file.recipe, self._without_products(self.file.settings))

    def plan(self, point: Point) -> PlannedRun:
        """Return the run of one point.

        Raises:
            ValueError: for whatever the recipe, the rule or the layout refuses.
        """
        texts = (*self.file.settings, *point.overrides)
        num_ranks = self.file.num_ranks
        for text in texts:
            if key_of(text) == RANKS_KEY:
                num_ranks = _positive(text)
        overrides = self._without_products(t for t in texts if key_of(t) != RANKS_KEY)
        run_dir = self.file.output_dir / "runs" / point.name
        overrides.append(text_override("train.output_dir", str(run_dir)))
        config = load_recipe(self.file.recipe, overrides)
        if config.tracking.mlflow and config.tracking.mlflow_uri is None:
            uri = sqlite_uri(self.file.output_dir / "mlflow.db")
            overrides.append(text_override("tracking.mlflow_uri", uri))
            config = replace(config, tracking=replace(config.tracking, mlflow_uri=uri))
        num_ranks = num_ranks or minimum_world_size(config)
        if self.file.rule != "as_written":
            iterations = rule_train_iters(
                self.file.rule, self._budget_config, config, num_ranks, self.file.num_ranks
            )
            overrides.append(f"train.train_iters={iterations}")
            config = replace(config, train=replace(config.train, train_iters=iterations))
        check_layout(config, num_ranks)
        return PlannedRun(point.name, point.values, tuple(overrides), num_ranks, config)

    def plan_all(self) -> list[PlannedRun]:
        """Return every run, in the grid's order.

        Raises:
            ValueError: every problem of every point, or else all points that are the same run, in
                one message.
        """
        runs: list[PlannedRun] = []
        concerned: dict[str, list[str]] = {}  # problem -> names of runs
        for point in self.file.points:
            try:
                runs.append(self.plan(point))
            except ValueError as error:
                concerned.setdefault(str(error), []).append(point.name)
        if concerned:
            problems = [
                f"{_some(names, len(self.file.points))}: {problem}"
                for problem, names in concerned.items()
            ]
            raise ValueError(listed(self.file.path, problems))
        self._check_all_differ(runs)
        return runs

    def _check_all_differ(self, runs: Iterable[PlannedRun]) -> None:
        first: dict[str, str] = {}
        directories: dict[Path, str] = {}
        problems: list[str] = []
        for run in runs:
            flat = flatten_config(run.config).items()
            trained = {key: value for key, value in flat if decides_training(key)}
            same = first.setdefault(repr((run.num_ranks, trained)), run.name)
            if same != run.name:
                problems.append(
                    f"{same} and {run.name} are the same run: their settings are equal; make them "
                    "differ or leave one out"
                )
            owner = directories.setdefault(run.run_dir, run.name)
            if owner != run.name:
                problems.append(
                    f"{owner} and {run.name} would both be written to train.output_dir="
                    f"{run.run_dir}; each run needs a directory of its own"
                )
        if problems:
            raise ValueError(listed(self.file.path, problems))

    def _without_products(self, overrides: Iterable[str]) -> list[str]:
        """Compute ``number * setting``; a setting's last override counts, else the recipe's."""
        texts = list(overrides)
        raw = {key_of(text): text.partition("=")[2] for text in texts}
        found: list[str] = []
        for text in texts:
            match = PRODUCT.fullmatch(text.partition("=")[2])
            if match is None or holds_text(key_of(text)):
                found.append(text)
                continue
            name = AXIS_KEYS.get(match[2], match[2])
            if name not in LEGAL_TYPES:
                raise ValueError(
                    f"{text}: {match[2]!r} is no setting; write a recipe key such as "
                    f"model.num_moe_experts, or one of {', '.join(AXIS_KEYS)}"
                )
            factor = raw.get(name, str(self._recipe_values[name]))
            if not factor.strip().isdigit():
                raise ValueError(f"{text}: {name}={factor} is not a whole number")
            found.append(f"{key_of(text)}={int(match[1]) * int(factor)}")
        return found


def decides_training(key: str) -> bool:
    """Tell whether a setting decides what is trained."""
    return key not in FREE_KEYS and not key.startswith(FREE_SECTION)


def _positive(text: str) -> int:
    value = text.partition("=")[2].strip()
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{text} must be a whole number of at least 1")
    return int(value)


def _some(names: list[str], num_all: int) -> str:
    if len(names) == num_all and num_all > 1:
        return f"all {num_all} runs"
    more = f" and {len(names) - PROBLEM_NAMES} more" if len(names) > PROBLEM_NAMES else ""
    return ", ".join(names[:PROBLEM_NAMES]) + more
