"""A divisibility rule and the equation it is reported as."""

from __future__ import annotations

from collections.abc import Iterator


def remainder(name: str, value: int, divisor: str, size: int, advice: str) -> Iterator[str]:
    """Yield ``name % divisor != 0`` with its numbers, unless ``size`` divides ``value``."""
    if value % size:
        yield f"{name} % {divisor} != 0: {value} % {size} = {value % size}; {advice}"
