"""Whole numbers are ints, others stay fractions."""

from __future__ import annotations

from fractions import Fraction

from vqmoe_megatron.plan.exact import exact


def test_whole_numbers_are_ints() -> None:
    assert type(exact(Fraction(6, 3))) is int and exact(Fraction(6, 3)) == 2
    assert type(exact(7)) is int and exact(7) == 7


def test_others_stay_as_they_are() -> None:
    assert exact(Fraction(1, 3)) == Fraction(1, 3)
    assert type(exact(Fraction(1, 3))) is Fraction
