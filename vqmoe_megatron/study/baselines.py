"""Which axis of a study holds the arms that are compared, and with which of them.

    study:
      baseline: smoe_top1                  # or a list; unset: the first arm

The arms are the words of one axis: named variants, or a setting's names. With ``baseline`` it is
the axis that has those words. Without, it is the axis ``arm``, else the only axis of words.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ARM_AXIS = "arm"


@dataclass(frozen=True)
class Arms:
    """``names`` in the study's order, ``baselines`` among them, of the axis ``axis``."""

    axis: str
    names: tuple[str, ...]
    baselines: tuple[str, ...]


def find_arms(axes: Mapping[str, Sequence[Any]], baselines: Sequence[str]) -> Arms:
    """Return the arms of a study with ``axes``, values by name, the seeds' left out.

    Raises:
        ValueError: no axis, or several, can be meant; or there is nothing to compare.
    """
    words = {
        name: tuple(value for value in values if isinstance(value, str))
        for name, values in axes.items()
    }
    words = {name: values for name, values in words.items() if values}
    if baselines:
        axis = _axis_of(words, baselines)
    elif ARM_AXIS in words:
        axis = ARM_AXIS
    else:
        several = [name for name, values in words.items() if len(values) > 1]
        if len(several) > 1:
            raise ValueError(
                f"the arms may be those of {' or '.join(several)}; name one of them in "
                f"study.baseline, for instance {words[several[0]][0]}"
            )
        if not several:
            raise ValueError("no axis has two named values to compare")
        axis = several[0]
    if len(words[axis]) < 2:
        raise ValueError(f"the axis {axis} has one arm, {words[axis][0]}, and nothing beside it")
    return Arms(axis, words[axis], tuple(baselines) or words[axis][:1])


def _axis_of(words: Mapping[str, Sequence[str]], baselines: Sequence[str]) -> str:
    """The one axis that has every one of ``baselines``."""
    known = [word for values in words.values() for word in values]
    for name in baselines:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}"
            raise ValueError(f"study.baseline: {name!r} is no named value of the grid: {hint}")
    axes = [name for name, values in words.items() if set(baselines) <= set(values)]
    if not axes:
        raise ValueError(
            f"study.baseline: {', '.join(baselines)} are of different axes; name arms of one"
        )
    if len(axes) > 1:
        raise ValueError(
            f"study.baseline: {', '.join(baselines)} is in the axes {' and '.join(axes)}; rename "
            "one of them"
        )
    return axes[0]


def read_baselines(content: Any) -> tuple[str, ...]:
    """Return ``study.baseline``, a name or a list of names; none when it is unset.

    Raises:
        ValueError: for anything else.
    """
    if content is None:
        return ()
    names = content if isinstance(content, list) else [content]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"study.baseline must be an arm or a list of arms, not {content!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"study.baseline names an arm twice: {', '.join(names)}")
    return tuple(names)
