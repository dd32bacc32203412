"""The fitted laws: known parameters come back, intervals cover, and what is open is not printed."""

import re

import numpy as np
import pytest

from vqmoe_megatron.study.report.intervals import student_t_quantile
from vqmoe_megatron.study.report.scaling_law import fit_laws

SIZES = np.repeat([4.0, 8, 16, 32, 64, 128], 2)  # two seeds
FLOOR, COEFFICIENT, EXPONENT = 1.2, 1.0, 0.5
CURVE = FLOOR + COEFFICIENT * SIZES**-EXPONENT


def noisy(curve, seed, size=0.01):
    return curve + size * np.random.default_rng(seed).standard_normal(len(curve))


def test_a_law_without_noise_comes_back():
    law = fit_laws(SIZES, CURVE, num_draws=20).power_law
    assert law.exponent.value == pytest.approx(EXPONENT, rel=0.007)  # the grid's step
    assert law.floor.value == pytest.approx(FLOOR, rel=0.002)
    assert law.coefficient.value == pytest.approx(COEFFICIENT, rel=0.005)
    assert law.losses(np.array([256.0])) == pytest.approx(1.2 + 1 / 16, rel=0.001)


def test_intervals_cover_the_known_parameters():
    num_studies, covered = 60, np.zeros(3)
    for seed in range(num_studies):
        law = fit_laws(SIZES, noisy(CURVE, seed), num_draws=200).power_law
        for index, (found, true) in enumerate(
            zip(
                (law.floor, law.coefficient, law.exponent),
                (FLOOR, COEFFICIENT, EXPONENT),
                strict=True,
            )
        ):
            assert found.low <= found.value <= found.high
            covered[index] += found.low <= true <= found.high
    # 95% intervals; 12 runs and 200 draws reach 90 to 95%, and 60 studies scatter by 3%
    assert (covered >= 0.83 * num_studies).all() and covered.min() < num_studies


def test_more_noise_makes_wider_intervals():
    quiet = fit_laws(SIZES, noisy(CURVE, 1, 0.002), num_draws=200).power_law
    loud = fit_laws(SIZES, noisy(CURVE, 1, 0.01), num_draws=200).power_law
    widths = [law.exponent.high - law.exponent.low for law in (quiet, loud)]
    assert widths[1] > 3 * widths[0]
    assert loud.residual_std == pytest.approx(0.01, rel=0.6)


def test_the_band_holds_the_curve_and_widens_outside():
    law = fit_laws(SIZES, noisy(CURVE, 1), num_draws=200).power_law
    places = np.array([8.0, 32.0, 1024.0])
    low, high = law.band(places)
    assert ((low < law.losses(places)) & (law.losses(places) < high)).all()
    assert high[2] - low[2] > high[1] - low[1]


@pytest.mark.parametrize(
    ("sizes", "losses", "reason"),
    [
        ([4, 8, 16], [2.0, 1.8, 1.7], "at least 4 numbers of experts"),
        ([4, 8, 16, 32], [2.0, 1.8, 1.7, 1.65], "5 finished runs; here are 4 and 4"),
        (SIZES, 1.0 + 0.1 * np.log2(SIZES), "does not fall"),
        (SIZES, noisy(np.full(12, 1.5), 4, 0.05), "open|does not fall|determine"),
        (SIZES, noisy(2.0 - 0.05 * np.log2(SIZES), 5, 0.02), "determine three parameters"),
        (SIZES, np.where(SIZES > 4, 1.5, 2.0), "reaches the limits of the search"),
    ],
)
def test_what_the_data_cannot_determine_is_not_printed(sizes, losses, reason):
    fits = fit_laws(np.array(sizes, dtype=float), np.array(losses, dtype=float), num_draws=200)
    assert fits.power_law is None
    assert re.search(reason, fits.power_law_reason)


def test_the_line_equals_least_squares_by_hand():
    # log2 N = 2, 3, 4 and L = 2.0, 1.7, 1.6: slope -0.2, mean 5.3/3, squares of residuals 0.02/3
    line = fit_laws(np.array([4.0, 8, 16]), np.array([2.0, 1.7, 1.6])).doubling
    assert line.per_doubling.value == pytest.approx(-0.2)
    assert line.at_one.value == pytest.approx(5.3 / 3 + 0.6)
    spread = (0.02 / 3) ** 0.5
    assert line.residual_std == pytest.approx(spread)
    half = student_t_quantile(1) * spread / 2**0.5
    assert line.per_doubling.high == pytest.approx(-0.2 + half)
    low, high = line.band(np.array([8.0]))  # at the centre: t * s / sqrt(n)
    assert (high - low) / 2 == pytest.approx(student_t_quantile(1) * spread / 3**0.5)


def test_two_sizes_have_no_line_and_none_has_nothing():
    fits = fit_laws(np.array([4.0, 8, 8]), np.array([2.0, 1.7, 1.6]))
    assert fits.doubling is None and "at least 3" in fits.doubling_reason
    assert fit_laws(np.array([]), np.array([])).doubling is None


@pytest.mark.parametrize(
    ("sizes", "losses"), [([4.0, 8.0], [1.0]), ([4.0], [float("nan")]), ([0.5], [1.0])]
)
def test_input_that_is_no_study_is_refused(sizes, losses):
    with pytest.raises(ValueError, match="one loss per run|finite losses"):
        fit_laws(np.array(sizes), np.array(losses))
