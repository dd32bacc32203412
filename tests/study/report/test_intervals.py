"""Confidence intervals over seeds, against tables and hand computation."""

import math

import pytest

from vqmoe_megatron.study.report.intervals import seed_means, seeds_of, student_t_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (60, 2.0003)],
)
def test_quantiles_equal_the_printed_table(freedom, quantile):
    assert student_t_quantile(freedom) == pytest.approx(quantile, abs=6e-5)


def test_quantile_at_another_confidence():
    assert student_t_quantile(10, 0.9) == pytest.approx(1.8125, abs=6e-5)
    assert student_t_quantile(5, 0.5) == pytest.approx(0.7267, abs=6e-5)


def test_one_group_has_the_plain_t_interval():
    # values 1, 2, 4: mean 7/3, variance 7/3, standard error sqrt(7)/3, t(2) = 4.3027
    (mean,) = seed_means([[1.0, 2.0, 4.0]])
    assert mean.mean == pytest.approx(7 / 3)
    assert mean.half_width == pytest.approx(4.3027 * math.sqrt(7) / 3, rel=2e-5)
    assert (mean.low, mean.high) == (mean.mean - mean.half_width, mean.mean + mean.half_width)
    assert (mean.num_seeds, mean.num_degrees_of_freedom) == (3, 2)


def test_groups_share_their_spread():
    # [1, 3] has squares 2, [5, 6, 10] has 14: s^2 = 16 / 3 with t(3) = 3.1824
    pair, triple = seed_means([[1.0, 3.0], [5.0, 6.0, 10.0]])
    spread = math.sqrt(16 / 3)
    assert pair.half_width == pytest.approx(3.1824 * spread / math.sqrt(2), rel=2e-5)
    assert triple.half_width == pytest.approx(3.1824 * spread / math.sqrt(3), rel=2e-5)


def test_a_single_seed_takes_the_others_spread_and_alone_has_none():
    alone, _ = seed_means([[1.0], [2.0, 4.0]])
    assert alone.half_width == pytest.approx(12.7062 * math.sqrt(2), rel=2e-5)
    (single,) = seed_means([[1.0]])
    assert single.half_width is None and single.low == single.high == 1.0


def test_what_has_no_interval_is_refused():
    with pytest.raises(ValueError, match="no mean"):
        seed_means([[1.0], []])
    with pytest.raises(ValueError, match="at least 1 degree of freedom"):
        student_t_quantile(0)


def test_seeds_are_a_number_or_a_range():
    assert seeds_of(seed_means([[1.0, 2.0], [3.0, 4.0]])) == "n = 2"
    assert seeds_of(seed_means([[1.0], [3.0, 4.0, 5.0]])) == "n = 1 to 3"
    assert seeds_of([]) == "none measured"
