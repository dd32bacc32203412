"""The section ``when``: overrides of some points only, such as a learning rate of one arm at one
size. A row names axes and their values, and what is set where all of them apply:

    when:
      - {arm: vq, experts: [64, 128], set: {optimizer.lr: 1.0e-3}}

They come after ``set`` and the axes. A run's name does not show them; runs.json does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vqmoe_megatron.study.axes import Axis, Condition, Point, applies, read_condition
from vqmoe_megatron.study.override_texts import key_of, override_texts


@dataclass(frozen=True)
class When:
    """One row: ``overrides`` for the points that meet ``condition``."""

    condition: Condition
    overrides: tuple[str, ...]


def read_when(content: Any, axes: list[Axis], problems: list[str]) -> list[When]:
    """Return the rows of the section ``when``; what is wrong is added to ``problems``."""
    if not isinstance(content, list) or not all(
        isinstance(row, dict) and len(row) > 1 and row.get("set") for row in content
    ):
        problems.append(
            "when must be a list of axes, their values and what they set, for instance "
            "`- {arm: vq, experts: 128, set: {optimizer.lr: 1.0e-3}}`"
        )
        return []
    owner = {key_of(t): a.name for a in axes for value in a.values for t in value.overrides}
    rows: list[When] = []
    for row in content:
        axes_part = {label: value for label, value in row.items() if label != "set"}
        condition = read_condition("when", axes_part, axes, problems)
        texts = override_texts("when: set", row["set"], problems) or ()
        problems += [
            f"when: {text}: {key_of(text)} is set by the axis {owner[key_of(text)]}, whose value a "
            "run's name shows; set it in one of the two"
            for text in texts
            if key_of(text) in owner
        ]
        rows.append(When(condition, texts))
    return rows


def with_rows(points: Iterable[Point], rows: Sequence[When]) -> list[Point]:
    """Return the points with the overrides of the rows that apply to them.

    Raises:
        ValueError: for a row that applies to no point, and for two rows that set one key of one.
    """
    used: set[int] = set()
    found: list[Point] = []
    for point in points:
        added: dict[str, str] = {}
        for number, row in enumerate(rows):
            if not applies(row.condition, point.values):
                continue
            used.add(number)
            for text in row.overrides:
                if key_of(text) in added:
                    raise ValueError(
                        f"when: two rows set {key_of(text)} of {point.name}, {added[key_of(text)]} "
                        f"and {text}; leave one out"
                    )
                added[key_of(text)] = text
        found.append(replace(point, overrides=(*point.overrides, *added.values())))
    for number, row in enumerate(rows):
        if number not in used:
            where = ", ".join(f"{name}={values}" for name, values in row.condition.items())
            raise ValueError(f"when: no run of the grid has {where}; remove the row")
    return found
