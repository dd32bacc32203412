"""Exact amounts: an int where it is a whole number, else a Fraction; never a rounded float."""

from __future__ import annotations

from fractions import Fraction

Exact = int | Fraction


def exact(value: Exact) -> Exact:
    """Return ``value`` as an int when it is a whole number, else as the :class:`Fraction` it is."""
    return value.numerator if value.denominator == 1 else Fraction(value)
