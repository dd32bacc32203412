"""What type a setting is declared to have, and whether a value has it.

Declarations are those of the section dataclasses: ``int``, ``float | None``, ``list[str]`` and the
like.
"""

from __future__ import annotations

import types
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

MOST_SHOWN = 120  # characters of a value in a message


@cache
def declared_types(section_type: type) -> dict[str, Any]:
    """Return field name -> declared type, in the order of the fields."""
    return get_type_hints(section_type)


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types a declaration allows: ``int | None`` gives ``(int, NoneType)``."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_numeric(hint: Any) -> bool:
    """Tell whether a declaration allows a number, or a list or tuple with one; a bool is none."""
    return any(
        kind in (int, float) or any(is_numeric(item) for item in get_args(kind))
        for kind in alternatives(hint)
    )


def has_type(value: Any, hint: Any) -> bool:
    """Tell whether ``value`` is of a declared type; a bool is no number, an int may be a float."""
    for kind in alternatives(hint):
        if get_origin(kind) is list:
            (item,) = get_args(kind)
            if isinstance(value, list) and all(has_type(entry, item) for entry in value):
                return True
        elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return True
        elif type(value) is kind:
            return True
    return False


def shown(value: Any) -> str:
    """Return a value as Python writes it, not the whole of a long one."""
    try:
        text = repr(value)
    except ValueError:  # it has more digits than Python turns into text
        return "a number of thousands of digits"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}... ({len(text):,} characters)"


def type_problem(key: str, value: Any, hint: Any) -> str | None:
    """Describe a value that is not of its declared type, as ``key: expected int, got ...``."""
    if has_type(value, hint):
        return None
    got = "null" if value is None else f"{type(value).__name__} {shown(value)}"
    return f"{key}: expected {_type_name(hint)}, got {got}"


def _type_name(hint: Any) -> str:
    return " or ".join(
        f"a list of {get_args(kind)[0].__name__}"
        if get_origin(kind) is list
        else {type(None): "null", bool: "true or false"}.get(kind, kind.__name__)
        for kind in alternatives(hint)
    )
