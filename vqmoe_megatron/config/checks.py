"""The checks that configuration sections share."""

from __future__ import annotations

from typing import Any

from vqmoe_megatron.config.declared_types import declared_types, shown, type_problem
from vqmoe_megatron.config.ranges import LEGAL_RANGES, range_problem
from vqmoe_megatron.config.texts import text_problem


def setting_problem(key: str, value: Any, hint: Any) -> str | None:
    """Say what is wrong with the value of ``section.name`` by itself: type, range, text."""
    problem = type_problem(key, value, hint)
    if problem and key in LEGAL_RANGES:
        return f"{problem}; it must be {LEGAL_RANGES[key] or 'a finite number'}"
    return problem or range_problem(key, value) or text_problem(key, value)


def check_settings(section: str, config: Any) -> None:
    """Raise one ``ValueError`` with every field that is not legal by itself."""
    found = [
        setting_problem(f"{section}.{name}", getattr(config, name), hint)
        for name, hint in declared_types(config.__class__).items()
    ]
    if problems := [problem for problem in found if problem]:
        raise ValueError("; ".join(problems))


def check_choice(section: str, name: str, value: object, legal: tuple[str, ...]) -> None:
    """Raise ``ValueError`` naming the legal values when ``value`` is not one of them."""
    if value not in legal:
        raise ValueError(
            f"{section}.{name}={shown(value)} is not legal; choose one of {', '.join(legal)}"
        )


def settled(value: int | None, name: str) -> int:
    """A setting that is null in recipes alone, behind the place where its number is filled in.

    Raises:
        ValueError: when nothing filled it in; ``name`` is the setting's.
    """
    if value is None:
        raise ValueError(f"{name} is null; give a number")
    return value
