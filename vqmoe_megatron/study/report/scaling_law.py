"""Loss against number of experts as a law, with its uncertainty, or the reason there is none.

N number of experts, L loss of one run, n runs, D bootstrap draws, B exponents tried.

    power law    L(N) = L_inf + a * N^-b      for fixed b linear in (L_inf, a): b is searched on a
                                              grid and the other two are solved for; L_inf >= 0,
                                              because a cross-entropy is
    doubling     L(N) = c + d * log2 N        d: change of the loss when N doubles

Every run is one point, so runs with several seeds weigh more. The power law's intervals come from a
bootstrap of residuals: residuals of the fit, made larger by sqrt(n / (n - 3)), are dealt out again
over the fitted curve and everything is fitted anew. The doubling law's come from Student's t. Both
take residuals to be independent and of one size. A power law that these data cannot determine is
not printed; the reason is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vqmoe_megatron.study.report.intervals import CONFIDENCE, student_t_quantile

NUM_DRAWS = 2000
EXPONENTS = np.geomspace(0.02, 4.0, 801)  # [B]; beyond, a power law is a logarithm or a step
FEWEST_SIZES, FEWEST_RUNS = 4, 5  # of a power law, which has three parameters
TAILS = (50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE))  # percentiles


@dataclass(frozen=True)
class Estimate:
    """A fitted number with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class PowerLaw:
    """L(N) = floor + coefficient * N^-exponent, losses in nats per token."""

    floor: Estimate
    coefficient: Estimate
    exponent: Estimate
    residual_std: float  # sqrt(sum of squares / (n - 3))
    num_runs: int
    draws: np.ndarray  # [D, 3]: floor, coefficient, exponent of every bootstrap draw

    @property
    def fitted(self) -> str:
        """The three numbers with their intervals."""
        return f"L_inf = {self.floor}, a = {self.coefficient}, b = {self.exponent}"

    def losses(self, num_experts: np.ndarray) -> np.ndarray:
        """The curve at ``num_experts`` [M], as [M]."""
        values = (self.floor.value, self.coefficient.value, self.exponent.value)
        return values[0] + values[1] * num_experts ** -values[2]

    def band(self, num_experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the curve's 95% interval at ``num_experts`` [M], each [M]."""
        floor, coefficient, exponent = (self.draws[:, i, None] for i in range(3))
        curves = floor + coefficient * num_experts[None] ** -exponent
        low, high = np.percentile(curves, TAILS, axis=0)
        return low, high


@dataclass(frozen=True)
class DoublingLaw:
    """L(N) = at_one + per_doubling * log2 N, losses in nats per token."""

    at_one: Estimate
    per_doubling: Estimate
    residual_std: float  # sqrt(sum of squares / (n - 2))
    num_runs: int
    mean_log2: float
    sum_of_squares_log2: float

    @property
    def fitted(self) -> str:
        """Both numbers with their intervals."""
        return f"c = {self.at_one}, d = {self.per_doubling} per doubling"

    def losses(self, num_experts: np.ndarray) -> np.ndarray:
        """The line at ``num_experts`` [M], as [M]."""
        return self.at_one.value + self.per_doubling.value * np.log2(num_experts)

    def band(self, num_experts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the line's 95% interval at ``num_experts`` [M], each [M]."""
        away = (np.log2(num_experts) - self.mean_log2) ** 2 / self.sum_of_squares_log2
        quantile = student_t_quantile(self.num_runs - 2)
        half = quantile * self.residual_std * np.sqrt(1 / self.num_runs + away)
        return self.losses(num_experts) - half, self.losses(num_experts) + half


@dataclass(frozen=True)
class Fits:
    """Both laws of one curve; where one is None, its reason says why."""

    power_law: PowerLaw | None
    power_law_reason: str
    doubling: DoublingLaw | None
    doubling_reason: str


def fit_laws(num_experts: np.ndarray, losses: np.ndarray, num_draws: int = NUM_DRAWS) -> Fits:
    """Fit both laws to runs with ``num_experts`` [n] and final ``losses`` [n]. Deterministic.

    Raises:
        ValueError: for arrays of different lengths, sizes below 1, or values that are not finite.
    """
    sizes, values = np.asarray(num_experts, dtype=float), np.asarray(losses, dtype=float)
    if sizes.shape != values.shape or sizes.ndim != 1:
        raise ValueError(f"one loss per run: got {sizes.shape} sizes and {values.shape} losses")
    if not (np.isfinite(values).all() and np.isfinite(sizes).all() and (sizes >= 1).all()):
        raise ValueError("a fit needs finite losses and numbers of experts of at least 1")
    power_law, power_reason = _power_law(sizes, values, num_draws)
    doubling, doubling_reason = _doubling_law(sizes, values)
    return Fits(power_law, power_reason, doubling, doubling_reason)


def _power_law(sizes: np.ndarray, values: np.ndarray, draws: int) -> tuple[PowerLaw | None, str]:
    num_sizes, num_runs = len(set(sizes)), len(sizes)
    if num_sizes < FEWEST_SIZES or num_runs < FEWEST_RUNS:
        return None, (
            f"three parameters need at least {FEWEST_SIZES} numbers of experts and {FEWEST_RUNS} "
            f"finished runs; here are {num_sizes} and {num_runs}"
        )
    best = _solve(sizes, values[None])[0]
    if best[1] <= 0:
        return None, "the loss does not fall with the number of experts"
    curve = best[0] + best[1] * sizes ** -best[2]
    residuals = values - curve
    inflated = (residuals - residuals.mean()) * math.sqrt(num_runs / (num_runs - 3))
    picked = np.random.default_rng(0).integers(num_runs, size=(draws, num_runs))
    found = _solve(sizes, curve + inflated[picked])
    share_rising = float((found[:, 1] <= 0).mean())
    if share_rising > (1 - CONFIDENCE) / 2:
        return None, (
            f"whether the loss falls with the number of experts is open: in {share_rising:.0%} of "
            "the bootstrap draws it does not"
        )
    low, high = np.percentile(found, TAILS, axis=0)
    if low[2] <= EXPONENTS[0] or high[2] >= EXPONENTS[-1]:
        return None, (
            f"the exponent's 95% interval, {low[2]:.3g} to {high[2]:.3g}, reaches the limits of "
            f"the search, {EXPONENTS[0]:g} to {EXPONENTS[-1]:g}: these sizes and this spread do "
            "not determine three parameters"
        )
    if low[0] <= 0:
        return None, (
            f"the floor's 95% interval, 0 to {high[0]:.3g}, reaches 0, below which no loss lies: "
            "these sizes and this spread do not determine three parameters"
        )
    floor, coefficient, exponent = (
        Estimate(*map(float, row)) for row in zip(best, low, high, strict=True)
    )
    spread = math.sqrt(float((residuals**2).sum()) / (num_runs - 3))
    return PowerLaw(floor, coefficient, exponent, spread, num_runs, found), ""


def _solve(sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares for every row of ``values`` [D, n]: floor, coefficient, exponent [D, 3]."""
    powers = sizes[None] ** -EXPONENTS[:, None]  # [B, n]
    means = values.mean(axis=1, keepdims=True)  # [D, 1]
    centred, away = values - means, powers - powers.mean(axis=1, keepdims=True)
    products, norms = centred @ away.T, (away**2).sum(axis=1)  # [D, B], [B]
    coefficients = products / norms
    floors = means - coefficients * powers.mean(axis=1)
    explained = products**2 / norms - (centred**2).sum(axis=1, keepdims=True)  # minus what is left
    # A negative floor is refitted as none: one parameter, not centred.
    products, norms = values @ powers.T, (powers**2).sum(axis=1)
    is_below = floors < 0
    coefficients = np.where(is_below, products / norms, coefficients)
    left = products**2 / norms - (values**2).sum(axis=1, keepdims=True)
    best = np.where(is_below, left, explained).argmax(axis=1)
    rows = np.arange(len(values))
    floors = np.maximum(floors[rows, best], 0.0)
    return np.stack([floors, coefficients[rows, best], EXPONENTS[best]], axis=1)


def _doubling_law(sizes: np.ndarray, values: np.ndarray) -> tuple[DoublingLaw | None, str]:
    num_sizes, num_runs = len(set(sizes)), len(sizes)
    if num_sizes < 3:
        return None, (
            f"a line with an uncertainty needs at least 3 numbers of experts; here are {num_sizes}"
        )
    logs = np.log2(sizes)
    away = logs - logs.mean()
    squares = float(away @ away)
    slope = float(away @ values) / squares
    at_one = float(values.mean() - slope * logs.mean())
    residuals = values - at_one - slope * logs
    spread = math.sqrt(float(residuals @ residuals) / (num_runs - 2))
    half = student_t_quantile(num_runs - 2) * spread
    of_slope = half / math.sqrt(squares)
    of_start = half * math.sqrt(1 / num_runs + logs.mean() ** 2 / squares)
    return DoublingLaw(
        Estimate(at_one, at_one - of_start, at_one + of_start),
        Estimate(slope, slope - of_slope, slope + of_slope),
        spread,
        num_runs,
        float(logs.mean()),
        squares,
    ), ""
