"""A study file: one YAML that describes a grid of runs.

    study:
      name: stdlib_experts
      output_dir: runs/stdlib_experts
      recipe: recipes/quickstart.yaml
      rule: equal_tokens             # or equal_flops, as_written
      num_ranks: 1                   # unset: the fewest the layout fits on
      baseline: smoe                 # the arm, or arms, to compare with; unset: see baselines.py
    set:                             # overrides of the recipe, the same for every run
      - model.hidden_size=64
      - vq.num_codes=4 * experts     # a whole number times another setting
    grid:
      experts: [4, 8]                # see axes.py
      arm:
        smoe: {vq.path: continuous}
        vq: {}
    exclude:
      - {experts: 8, arm: smoe}
    when:                            # overrides of some points only, see when.py
      - {experts: 8, arm: vq, set: {optimizer.lr: 1.0e-3}}

Paths are relative to the working directory, as those of a recipe are.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmoe_megatron.config.recipe_text import STUDY, parse_yaml_text, read_yaml_text
from vqmoe_megatron.study.axes import RANKS_KEY, Axis, Point, points, read_axes, read_exclusions
from vqmoe_megatron.study.baselines import find_arms, read_baselines
from vqmoe_megatron.study.override_texts import key_of, override_texts
from vqmoe_megatron.study.when import When, read_when, with_rows

RULES = ("equal_tokens", "equal_flops", "as_written")
SECTIONS = ("study", "set", "grid", "exclude", "when")
STUDY_KEYS: dict[str, type] = {
    "name": str,
    "output_dir": str,
    "recipe": str,
    "rule": str,
    "num_ranks": int,
}
OPTIONAL_KEYS = ("num_ranks",)
BASELINE = "baseline"  # the one key that may be a name or a list
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
# What the study decides for every run.
OWN_KEYS = ("train.output_dir", "tracking.run_name", "tracking.parent_run_id")


@dataclass(frozen=True)
class StudyFile:
    """A study file that is right in itself; recipes and layouts are not looked at yet."""

    path: Path
    name: str
    output_dir: Path
    recipe: Path
    rule: str
    num_ranks: int | None  # None: the fewest the layout fits on
    baselines: tuple[str, ...]  # arms that the report compares with; none: see baselines.py
    settings: tuple[str, ...]  # overrides that all runs share
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    content: dict[str, Any]  # as written, for the copy in the study's directory


def read_study_file(path: Path) -> StudyFile:
    """Read and check ``path``.

    Raises:
        ValueError: everything that is wrong in one message, with the nearest legal names.
    """
    path = Path(path)
    content = _load(path)
    problems = [
        _unknown("section", str(key), SECTIONS) for key in content if str(key) not in SECTIONS
    ]
    study = _study_section(content.get("study"), problems)
    settings = override_texts("set", content.get("set"), problems) or ()
    axes = read_axes(content.get("grid"), problems)
    exclusions = read_exclusions(content.get("exclude") or [], axes, problems)
    when = read_when(content.get("when") or [], axes, problems)
    _check_own_keys(settings, axes, when, study.get("rule"), problems)
    found: list[Point] = []
    if not problems:
        try:
            found = with_rows(points(axes, exclusions), when)
            if study[BASELINE]:
                values = {axis.name: [value.value for value in axis.values] for axis in axes}
                find_arms(values, study[BASELINE])
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(listed(path, problems))
    return StudyFile(
        path=path,
        name=study["name"],
        output_dir=Path(study["output_dir"]),
        recipe=Path(study["recipe"]),
        rule=study["rule"],
        num_ranks=study.get("num_ranks"),
        baselines=study[BASELINE],
        settings=settings,
        axes=tuple(axes),
        points=tuple(found),
        content=content,
    )


def listed(path: Path, problems: list[str]) -> str:
    """Return one message for all problems of a study file."""
    problems = [problem.replace("\n", "\n    ") for problem in dict.fromkeys(problems)]
    if len(problems) == 1:
        return f"study {path}: {problems[0]}"
    return f"{len(problems)} problems in study {path}:\n" + "\n".join(f"  - {p}" for p in problems)


def study_section(path: Path) -> dict[str, Any]:
    """Return the section ``study`` of a file as it is written, for who does not run the study.

    Raises:
        ValueError: for a file that is no study.
    """
    section = _load(path).get("study")
    if not isinstance(section, dict):
        raise ValueError(f"{path} is not a study: it has no section `study:`")
    return section


def _load(path: Path) -> dict[str, Any]:
    """Read the text as a recipe's is: once, and bounded before it is built."""
    return parse_yaml_text(read_yaml_text(path, STUDY), path, ", ".join(SECTIONS), STUDY)[0]


def _study_section(section: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(section, dict):
        problems.append(f"section study is missing; its keys are {', '.join(STUDY_KEYS)}")
        return {}
    good: dict[str, Any] = {BASELINE: ()}
    try:
        good[BASELINE] = read_baselines(section.get(BASELINE))
    except ValueError as error:
        problems.append(str(error))
    for key, value in section.items():
        expected = STUDY_KEYS.get(str(key))
        if key == BASELINE:
            continue
        if expected is None:
            legal = [f"study.{name}" for name in (*STUDY_KEYS, BASELINE)]
            problems.append(_unknown("key", f"study.{key}", legal))
        elif value is None and key in OPTIONAL_KEYS:
            continue
        elif type(value) is not expected:
            problems.append(f"study.{key}: expected {expected.__name__}, got {value!r}")
        else:
            good[str(key)] = value
    for key in STUDY_KEYS:
        if key not in section and key not in OPTIONAL_KEYS:
            problems.append(f"study.{key} is missing")
    if "name" in good and not STUDY_NAME.fullmatch(good["name"]):
        problems.append(f"study.name: letters, digits and _ . - only, not {good['name']!r}")
    if "output_dir" in good and not good["output_dir"].strip():
        problems.append("study.output_dir is empty; name a directory, for instance runs/NAME")
    if "rule" in good and good["rule"] not in RULES:
        problems.append(f"study.rule={good['rule']!r}: choose one of {', '.join(RULES)}")
    if good.get("num_ranks", 1) < 1:
        problems.append(f"study.num_ranks={good['num_ranks']} must be at least 1")
    return good


def _check_own_keys(
    settings: Iterable[str],
    axes: list[Axis],
    when: list[When],
    rule: str | None,
    problems: list[str],
) -> None:
    of_points = [text for axis in axes for value in axis.values for text in value.overrides]
    of_points += [text for row in when for text in row.overrides]
    for text in (*settings, *of_points):
        if key_of(text) in OWN_KEYS:
            problems.append(f"{text}: the study itself sets {key_of(text)} for every run")
    for text in settings:
        if key_of(text) == RANKS_KEY:
            problems.append(f"set: {text} belongs to the section study, as num_ranks")
    for text in of_points:
        if key_of(text) == "train.train_iters" and rule != "as_written":
            problems.append(
                f"{text} in the grid: study.rule={rule} computes train.train_iters; use "
                "rule: as_written for other lengths"
            )


def _unknown(what: str, name: str, legal: Iterable[str]) -> str:
    legal = list(legal)
    near = difflib.get_close_matches(name, legal, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "none is near."
    return f"unknown {what} {name!r}: {hint} Legal: {', '.join(legal)}"
