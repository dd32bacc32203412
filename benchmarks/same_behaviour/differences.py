"""What differs between two observations of one scenario, one row per thing seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MISSING = "(nothing)"
MAX_CHARACTERS = 160  # of a value in a row


@dataclass(frozen=True)
class Difference:
    """``what`` of ``scenario`` is ``old`` in one checkout and ``new`` in the other.

    ``detail``: where in a series or text they first differ, and by how much.
    """

    scenario: str
    what: str
    old: str
    new: str
    detail: str = ""


def differences(scenario: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """Return a row for every key whose values are not the same to the last bit.

    Values are what JSON can hold. Numbers are compared by their shortest exact text: NaN equals
    NaN, -0.0 does not equal 0.0, 1 does not equal 1.0.
    """
    rows = []
    for what in dict.fromkeys((*old, *new)):
        if what not in old or what not in new:
            sides = [_short(side[what]) if what in side else MISSING for side in (old, new)]
            rows.append(Difference(scenario, what, *sides))
        elif _exact(old[what]) != _exact(new[what]):
            rows.append(Difference(scenario, what, *_described(old[what], new[what])))
    return rows


def _exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _described(old: Any, new: Any) -> tuple[str, str, str]:
    """Old, new and detail of two unequal values."""
    if isinstance(old, str) and isinstance(new, str):
        return _of_series(old.splitlines(), new.splitlines(), "line")
    if isinstance(old, list) and isinstance(new, list):
        return _of_series(old, new, "value")
    if isinstance(old, dict) and isinstance(new, dict):
        (first, *others) = differences("", old, new)
        also = f", and {len(others)} more" if others else ""
        return first.old, first.new, f"at {first.what}{also}"
    return _short(old), _short(new), _distance([(old, new)])


def _of_series(old: Sequence[Any], new: Sequence[Any], unit: str) -> tuple[str, str, str]:
    """Old, new and detail at the first place where two series part."""
    unequal = [
        place
        for place in range(max(len(old), len(new)))
        if _exact(old[place : place + 1]) != _exact(new[place : place + 1])
    ]
    if not unequal:  # texts that differ in their last line's end
        return _short(old[-1:]), _short(new[-1:]), "at the end"
    first = unequal[0]
    sides = [_short(side[first]) if first < len(side) else MISSING for side in (old, new)]
    pairs = [(old[place], new[place]) for place in unequal if place < min(len(old), len(new))]
    count = f"{len(unequal)} of {max(len(old), len(new))} {unit}s, first {unit} {first + 1}"
    return *sides, ", ".join(filter(None, (count, _distance(pairs))))


def _distance(pairs: list[tuple[Any, Any]]) -> str:
    """Return the largest relative difference, where there are numbers."""
    found = [
        abs(new - old) / max(abs(old), abs(new))
        for old, new in pairs
        if _is_number(old) and _is_number(new) and old != new
    ]
    return f"relative {max(found):.1e}" if found else ""


def _is_number(value: Any) -> bool:
    is_numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_numeric and math.isfinite(value)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else _exact(value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[: MAX_CHARACTERS - 3]}..."
