"""The grid of a study: axes, their values, and the points that are left after exclusions.

An axis is one of

    experts: [4, 8]                     a short name of AXIS_KEYS
    optimizer.lr: [1.0e-3, 3.0e-3]      any recipe key
    arm:                                named variants, each a list or a mapping of overrides
      smoe: [vq.path=continuous]
      smoe_top2: {vq.path: continuous, model.moe_router_topk: 2}
      vq: {}                            the recipe and `set` as they are

A run's name joins one piece per axis, ``experts64-vq-seed1``; it depends on the point alone, so
values added to an axis leave the names of the others as they are.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vqmoe_megatron.config.recipe import LEGAL_TYPES
from vqmoe_megatron.study.override_texts import key_of, override_texts

RANKS_KEY = "study.num_ranks"  # the one key of an axis that is no recipe key
AXIS_KEYS = {
    "experts": "model.num_moe_experts",
    "codes": "vq.num_codes",
    "execution": "vq.execution",
    "seed": "train.seed",
    "ranks": RANKS_KEY,
}
SHORT_NAMES = {key: name for name, key in AXIS_KEYS.items()}
VARIANT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.]*")
PLAIN_VALUE = re.compile(r"[A-Za-z0-9_.+-]+")
Condition = Mapping[str, list[Any]]  # axis -> the values that meet it


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis: what a point shows, its piece of a run's name, what it overrides."""

    value: int | float | str | bool
    piece: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Axis:
    """``name`` as points and reports show it."""

    name: str
    values: tuple[AxisValue, ...]


@dataclass(frozen=True)
class Point:
    """One combination: ``values`` by axis, in the grid's order, and its overrides."""

    name: str
    values: Mapping[str, int | float | str | bool]
    overrides: tuple[str, ...]


def read_axes(grid: Any, problems: list[str]) -> list[Axis]:
    """Return the axes of the section ``grid``; what is wrong is added to ``problems``."""
    if not isinstance(grid, dict) or not grid:
        problems.append(
            "grid must hold one axis per line, for instance `experts: [4, 8]` and `seed: [1, 2]`"
        )
        return []
    axes: list[Axis] = []
    for label, content in grid.items():
        axis = _read_axis(str(label), content, problems)
        if axis is not None and axis.name in {known.name for known in axes}:
            problems.append(f"grid.{label} is the axis {axis.name}, which is there already")
        elif axis is not None:
            axes.append(axis)
    problems += _shared_keys(axes)
    return axes


def read_exclusions(exclude: Any, axes: list[Axis], problems: list[str]) -> list[Condition]:
    """Return each exclusion; a point is left out when all values of one apply."""
    if not isinstance(exclude, list) or not all(isinstance(row, dict) and row for row in exclude):
        problems.append(
            "exclude must be a list of combinations, for instance `- {experts: 128, router: smoe}`"
        )
        return []
    return [read_condition("exclude", row, axes, problems) for row in exclude]


def read_condition(
    section: str, row: Mapping[Any, Any], axes: list[Axis], problems: list[str]
) -> Condition:
    """Return ``row``, axis -> a value or a list of them; ``section`` is where it stands."""
    by_name = {axis.name: [value.value for value in axis.values] for axis in axes}
    condition: dict[str, list[Any]] = {}
    for label, value in row.items():
        name = SHORT_NAMES.get(str(label), str(label))
        values = value if isinstance(value, list) else [value]
        if name not in by_name:
            problems.append(f"{section}: {_nearest('axis', name, by_name)}")
            continue
        for one in values:
            if one not in by_name[name]:
                legal = ", ".join(map(str, by_name[name]))
                problems.append(f"{section}: {name}={one} is not in the grid; it has {legal}")
        condition[name] = values
    return condition


def applies(condition: Condition, values: Mapping[str, Any]) -> bool:
    """Tell whether a point with ``values`` by axis meets all of ``condition``."""
    return all(values[name] in legal for name, legal in condition.items())


def points(axes: list[Axis], exclusions: Iterable[Condition]) -> list[Point]:
    """Return the combinations in the grid's order, the last axis running fastest.

    Raises:
        ValueError: when nothing is left, or two points would share a name.
    """
    exclusions = list(exclusions)
    found: dict[str, Point] = {}
    for combination in itertools.product(*(axis.values for axis in axes)):
        values = {axis.name: v.value for axis, v in zip(axes, combination, strict=True)}
        if any(applies(exclusion, values) for exclusion in exclusions):
            continue
        name = "-".join(value.piece for value in combination)
        if name in found:
            raise ValueError(
                f"two points of the grid would be called {name}: {_words(found[name].values)} and "
                f"{_words(values)}; rename a variant"
            )
        overrides = tuple(text for value in combination for text in value.overrides)
        found[name] = Point(name, values, overrides)
    if not found:
        raise ValueError("exclude leaves no run of the grid; remove one of its lines")
    return list(found.values())


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _read_axis(label: str, content: Any, problems: list[str]) -> Axis | None:
    key = AXIS_KEYS.get(label, label)
    name = SHORT_NAMES.get(key, key)
    is_key = key in LEGAL_TYPES or key == RANKS_KEY
    if isinstance(content, dict) and content:
        return Axis(name, tuple(_variants(label, content, problems)))
    if not is_key:
        problems.append(_unknown_axis(label))
        return None
    if not isinstance(content, list) or not content:
        problems.append(f"grid.{label} must be a list of values, not {content!r}")
        return None
    values: list[AxisValue] = []
    for value in content:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        piece = re.sub(r"\s*\*\s*", "x", text)  # 4 * experts
        if isinstance(value, list | dict) or value is None or not PLAIN_VALUE.fullmatch(piece):
            problems.append(
                f"grid.{label}: the value {value!r} cannot be part of a name; use named variants, "
                f"for instance {label.split('.')[-1]}: {{first: [{key}={text}]}}"
            )
        elif text in {known.overrides[0].partition("=")[2] for known in values}:
            problems.append(f"grid.{label} holds {text} twice")
        else:
            short = name.split(".")[-1]
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            joined = f"{short}{piece}" if is_number or "*" in text else f"{short}_{piece}"
            values.append(AxisValue(value, joined, (f"{key}={text}",)))
    return Axis(name, tuple(values))


def _variants(label: str, content: dict[Any, Any], problems: list[str]) -> Iterable[AxisValue]:
    for variant, overrides in content.items():
        name = str(variant)
        if not VARIANT_NAME.fullmatch(name):
            problems.append(
                f"grid.{label}: a variant's name is letters, digits, _ and ., not {name!r}"
            )
        elif (texts := override_texts(f"grid.{label}.{name}", overrides, problems)) is not None:
            yield AxisValue(name, name, texts)


def _shared_keys(axes: list[Axis]) -> Iterable[str]:
    """Two axes on one key: the later would silently win."""
    owner: dict[str, str] = {}
    for axis in axes:
        keys = {key_of(text) for value in axis.values for text in value.overrides}
        for key in sorted(keys):
            if key in owner:
                yield f"{key} is set by two axes, {owner[key]} and {axis.name}; leave one out"
            owner[key] = axis.name


def _unknown_axis(label: str) -> str:
    known = f"short names: {', '.join(AXIS_KEYS)}; any recipe key; or named variants"
    if "." in label or label in {key.split(".")[1] for key in LEGAL_TYPES}:
        same = [key for key in LEGAL_TYPES if key.split(".")[1] == label.split(".")[-1]]
        near = same or difflib.get_close_matches(label, LEGAL_TYPES, n=3, cutoff=0.6)
    else:
        near = difflib.get_close_matches(label, AXIS_KEYS, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown axis grid.{label}: {hint}({known})"


def _nearest(what: str, name: str, legal: Iterable[str]) -> str:
    legal = list(legal)
    near = difflib.get_close_matches(name, legal, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose from {', '.join(legal)}"
    return f"unknown {what} {name!r}: {hint}"
