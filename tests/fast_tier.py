"""Which of many combinations the fast tier runs: few, and every two values still meet."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from itertools import combinations, cycle

import pytest

Case = Sequence[Hashable]


def covering(cases: Iterable[Case]) -> list[Case]:
    """Return the cases, in their order, of a small subset that has every pair of values at every
    two places that any case has. Greedy: the one that adds most, the first of equals."""
    pairs_of = {tuple(case): set(combinations(enumerate(case), 2)) for case in cases}
    missing = set().union(*pairs_of.values())
    chosen = []
    while missing:
        best = max(pairs_of, key=lambda case: len(pairs_of[case] & missing))
        missing -= pairs_of.pop(best)
        chosen.append(best)
    return [case for case in cases if tuple(case) in chosen]


def spread(names: Iterable[Hashable], places: Iterable[Hashable]) -> list[Case]:
    """Each name once, at one place after the other: for names that are too many to meet all."""
    return list(zip(names, cycle(places), strict=False))


def tiered(cases: Sequence[Case], fast: Iterable[Case], ids: Sequence[str] = ()) -> list:
    """Pytest's parameters of all ``cases``; those that are not in ``fast`` are of the full tier."""
    chosen = set(map(tuple, fast))
    names = ids or ["-".join(map(str, case)) for case in cases]
    return [
        pytest.param(*case, id=name, marks=() if tuple(case) in chosen else pytest.mark.full)
        for case, name in zip(cases, names, strict=True)
    ]


def only(names: Iterable[str], *fast: str) -> list:
    """Pytest's parameters of all ``names``, of which the fast tier runs these."""
    names = list(names)
    assert set(fast) <= set(names), set(fast) - set(names)
    return [
        pytest.param(name, id=name, marks=() if name in fast else pytest.mark.full)
        for name in names
    ]
