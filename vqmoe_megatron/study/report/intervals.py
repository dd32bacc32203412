"""Confidence intervals over seeds: Student's t, with one standard deviation pooled over groups.

A group holds the values of one configuration under its seeds. Two or three seeds say little about
their own spread, so the groups of one curve share theirs:

    s^2 = sum over groups and seeds (x - mean of its group)^2 / nu,   nu = sum over groups (n - 1)
    mean +- t(nu) * s / sqrt(n)

This takes the spread over seeds to be the same in all groups of a curve. With one group it is the
plain t-interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
POOLED = (
    "95% t-intervals of the mean over seeds; the standard deviation over seeds is pooled over the "
    "points of a curve, which takes it to be the same at all of them"
)


@dataclass(frozen=True)
class SeedMean:
    """A mean over seeds; ``half_width`` is None where no group has two seeds."""

    mean: float
    num_seeds: int
    half_width: float | None
    num_degrees_of_freedom: int

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean itself without one."""
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean itself without one."""
        return self.mean + (self.half_width or 0.0)


def seed_means(groups: Sequence[Sequence[float]]) -> list[SeedMean]:
    """Return every group's mean with its interval, the spread pooled over all groups.

    Raises:
        ValueError: for an empty group.
    """
    if any(not group for group in groups):
        raise ValueError("a group without values has no mean")
    means = [math.fsum(group) / len(group) for group in groups]
    freedom = sum(len(group) - 1 for group in groups)
    pairs = list(zip(means, groups, strict=True))
    if not freedom:
        return [SeedMean(mean, len(group), None, 0) for mean, group in pairs]
    squares = math.fsum((value - mean) ** 2 for mean, group in pairs for value in group)
    half = student_t_quantile(freedom) * math.sqrt(squares / freedom)
    return [
        SeedMean(mean, len(group), half / math.sqrt(len(group)), freedom) for mean, group in pairs
    ]


def seeds_of(means: Iterable[SeedMean]) -> str:
    """Return ``n = 2``, or the range over the means that a plot draws."""
    counts = sorted({mean.num_seeds for mean in means})
    if not counts:
        return "none measured"
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"


def student_t_quantile(num_degrees_of_freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return t with P(\\|T\\| < t) = ``confidence``: 12.706 for 1 degree of freedom and 0.95.

    Raises:
        ValueError: for fewer than 1 degree of freedom, or a confidence outside (0, 1).
    """
    if num_degrees_of_freedom < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"Student's t needs at least 1 degree of freedom and a confidence in (0, 1), not "
            f"{num_degrees_of_freedom} and {confidence}"
        )
    low, high = 0.0, math.pi / 2  # of the angle atan(t / sqrt(nu)), in which P rises
    for _ in range(100):
        middle = (low + high) / 2
        if _central_probability(middle, num_degrees_of_freedom) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(num_degrees_of_freedom) * math.tan(low)


def _central_probability(angle: float, freedom: int) -> float:
    """P(|T| < sqrt(freedom) * tan(angle)): the finite sums of Abramowitz and Stegun 26.7.3-4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for power in range(1 if is_odd else 0, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
