"""``${section.key}`` in a recipe: the value of another setting, as OmegaConf resolves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

MARKS = ("${", "???")  # OmegaConf's: a reference, and a value that is still to be given


@dataclass(frozen=True)
class Unresolved:
    """Stands for a value that could not be resolved."""

    why: str


def resolved(values: dict[str, Any]) -> dict[str, Any]:
    """Return values by dotted key with every reference replaced, or an :class:`Unresolved`.

    Values without a mark, those of nearly every recipe, are returned as they are: a tree of
    OmegaConf's nodes for every setting took much of the time in which a study is listed.
    """
    if not any(mark in repr(value) for value in values.values() for mark in MARKS):
        return values
    tree = OmegaConf.create()
    found: dict[str, Any] = {}
    for key, value in values.items():
        try:
            OmegaConf.update(tree, key, value, merge=False)
        except OmegaConfBaseException as error:  # a ${ that is not well formed
            found[key] = Unresolved(str(error).splitlines()[0])
    for key in values.keys() - found.keys():
        try:
            value = OmegaConf.select(tree, key, throw_on_missing=True)
            is_nested = OmegaConf.is_config(value)
            found[key] = OmegaConf.to_container(value, resolve=True) if is_nested else value
        except OmegaConfBaseException as error:
            found[key] = Unresolved(str(error).splitlines()[0])
    return found
