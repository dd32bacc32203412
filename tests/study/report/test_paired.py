"""Paired differences against hand computation, and every way in which a pair can be missing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from paired_study import paired_study, plant, run_name

from vqmoe_megatron.study.baselines import Arms
from vqmoe_megatron.study.report.intervals import SeedMean, seed_means
from vqmoe_megatron.study.report.paired import (
    FINAL_BITS,
    axis_values,
    compare_arms,
    gain_changes,
    seed_axes,
    study_arms,
    verdict,
)
from vqmoe_megatron.study.report.series import FINAL_LOSS

BASE = (2.0, 2.5, 1.5, 3.0)  # seeds far apart: unpaired, no arm could be told from another


@pytest.fixture
def study(tmp_path):
    return paired_study(tmp_path / "s")


def comparison(study, experts: int, arm: str, baseline: str = "smoe"):
    arms = study_arms(replace(study, baselines=(baseline,)))
    (found,) = (
        one
        for one in compare_arms(study, arms)
        if dict(one.place)["experts"] == experts and one.arm == arm
    )
    return found


def said_of(mean: SeedMean | None) -> str:
    return verdict(mean, "better", "worse")


def test_arms_seeds_and_places_are_found(study) -> None:
    assert seed_axes(study.rows) == ["seed"]
    assert axis_values(study.rows)["experts"] == [4, 64]
    assert study_arms(study) == Arms("router", ("smoe", "smoe_top2", "vq"), ("smoe",))
    found = compare_arms(study, study_arms(replace(study, baselines=("smoe", "vq"))))
    assert [(one.num_moe_experts, one.arm, one.baseline) for one in found] == [
        (4, "smoe_top2", "smoe"),
        (4, "vq", "smoe"),
        (64, "smoe_top2", "smoe"),
        (64, "vq", "smoe"),
        (4, "smoe", "vq"),
        (4, "smoe_top2", "vq"),
        (64, "smoe", "vq"),
        (64, "smoe_top2", "vq"),
    ]
    assert all(len(one.pairs) == 4 and not one.left_out for one in found)


def test_a_difference_is_that_of_the_pairs_and_not_of_the_means(study) -> None:
    # differences -0.1, -0.2, -0.2, -0.3: mean -0.2, variance 0.02 / 3, standard error
    # sqrt(0.02 / 12) = 0.040825, t(3) = 3.1824, half width 0.12992
    plant(study, {(4, "smoe"): BASE, (4, "vq"): (1.9, 2.3, 1.3, 2.7)})
    mean = comparison(study, 4, "vq").mean(FINAL_BITS)
    assert mean.mean == pytest.approx(-0.2) and mean.num_seeds == 4
    assert mean.half_width == pytest.approx(0.12992, rel=1e-4)
    assert said_of(mean) == "better"
    assert said_of(comparison(study, 4, "smoe", "vq").mean(FINAL_BITS)) == "worse"
    loss = comparison(study, 4, "vq").mean(FINAL_LOSS)
    assert loss.half_width == pytest.approx(mean.half_width * math.log(2))


def test_identical_pairs_are_not_separated(study) -> None:
    plant(study, {(4, "smoe"): BASE, (4, "vq"): BASE})
    mean = comparison(study, 4, "vq").mean(FINAL_BITS)
    assert (mean.mean, mean.half_width) == (0.0, 0.0) and said_of(mean) == "not separated"


def test_one_outlier_takes_the_verdict_away(study) -> None:
    plant(study, {(4, "smoe"): BASE, (4, "vq"): (1.9, 2.3, 1.3, 2.7)})
    assert said_of(comparison(study, 4, "vq").mean(FINAL_BITS)) == "better"
    plant(study, {(4, "vq"): (1.9, 2.3, 1.3, 4.0)})
    assert said_of(comparison(study, 4, "vq").mean(FINAL_BITS)) == "not separated"


def test_an_interval_that_touches_zero_separates_nothing() -> None:
    assert verdict(SeedMean(-1.0, 3, 1.0, 2), "better", "worse") == "not separated"
    assert verdict(SeedMean(-1.0, 3, 0.999, 2), "better", "worse") == "better"
    assert verdict(SeedMean(1.0, 3, 0.999, 2), "better", "worse") == "worse"
    assert verdict(None, "better", "worse") == "no pair"


def test_one_seed_has_a_difference_and_no_interval(tmp_path) -> None:
    study = paired_study(tmp_path / "s", seeds=(1,))
    plant(study, {(4, "smoe"): (2.0,), (4, "vq"): (1.0,)})
    mean = comparison(study, 4, "vq").mean(FINAL_BITS)
    assert mean.mean == -1.0 and mean.half_width is None
    assert said_of(mean) == "one pair, no interval"


def test_runs_that_are_missing_unfinished_or_diverged_leave_their_pair_out(tmp_path) -> None:
    study = paired_study(
        tmp_path / "s",
        sizes=(4,),
        states={run_name(4, "vq", 1): ("failed", 9), run_name(4, "smoe", 1): ("pending", 0)},
        diverged={run_name(4, "vq", 2): 16},
    )
    study.rows[:] = [row for row in study.rows if row.name != run_name(4, "vq", 3)]
    found = comparison(study, 4, "vq")
    assert [dict(seed)["seed"] for seed in found.pairs] == [4]
    assert {dict(seed)["seed"]: why for seed, why in found.left_out.items()} == {
        1: "experts4-vq-ranks1-seed1 failed (9 of 40) and experts4-smoe-ranks1-seed1 waiting "
        "(0 of 40)",
        2: "experts4-vq-ranks1-seed2 diverged",
        3: "vq is not in the study",
    }


def test_runs_on_other_data_are_no_pair_but_under_equal_flops_lengths_may_differ(study) -> None:
    for row in study.rows:
        if row.point["router"] == "vq" and row.point["experts"] == 4:
            row.config.data.path = "data/other"
        elif row.point["router"] == "vq":
            row.config.train.train_iters = 50
    other_data, *_ = comparison(study, 4, "vq").left_out.values()
    other_length, *_ = comparison(study, 64, "vq").left_out.values()
    assert "experts4-vq-ranks1-seed1 has data.path=data/other" in other_data
    assert "has train.train_iters=50, experts64-smoe-ranks1-seed1 40" in other_length
    equal_flops = replace(study, rule="equal_flops")
    assert len(comparison(equal_flops, 4, "vq").left_out) == 4
    assert len(comparison(equal_flops, 64, "vq").pairs) == 4


def test_streams_are_no_pair_of_shuffled_samples(study) -> None:
    for row in study.rows:
        if row.point["router"] == "vq" and row.point["experts"] == 4:
            row.config.model.attention = "transformer_xl"
    found = comparison(study, 4, "vq")
    assert not found.pairs
    assert "has model.attention=transformer_xl" in next(iter(found.left_out.values()))
    assert len(comparison(study, 64, "vq").pairs) == 4


def test_a_gain_is_compared_between_sizes_seed_by_seed(study) -> None:
    # gains at 4 experts 0.1, 0.1, 0.2, 0.2, at 64 0.3, 0.4, 0.4, 0.5: changes 0.2, 0.3, 0.2, 0.3;
    # their mean 0.25, standard error sqrt(0.01 / 3 / 4) = 0.028868, half width 0.091868
    plant(study, {(4, "smoe"): BASE, (4, "vq"): (1.9, 2.4, 1.3, 2.8)})
    plant(study, {(64, "smoe"): BASE, (64, "vq"): (1.7, 2.1, 1.1, 2.5)})
    _, change = gain_changes(compare_arms(study, study_arms(study)))
    assert (change.axis, change.at.arm, change.at.num_moe_experts) == ("experts", "vq", 64)
    assert change.reference.num_moe_experts == 4
    mean = change.mean(FINAL_BITS)
    assert mean.mean == pytest.approx(0.25)
    assert mean.half_width == pytest.approx(0.091868, rel=1e-4)
    assert verdict(mean, "smaller", "larger") == "larger"

    study.rows[:] = [  # one run fails at 64, a seed is only at 64
        row
        for row in study.rows
        if not (row.point["experts"] == 4 and row.point["seed"] == 4)
        and row.name != run_name(64, "vq", 1)
    ]
    _, change = gain_changes(compare_arms(study, study_arms(study)))
    assert [dict(seed)["seed"] for seed in change.differences(FINAL_BITS)] == [2, 3]
    assert {dict(seed)["seed"]: why for seed, why in change.left_out.items()} == {
        1: "vq is not in the study",
        4: "not in the study at experts 4",
    }


def test_times_are_ratios_of_pairs(study) -> None:
    for row in study.rows:
        row.tokens_per_second = (
            100.0 * row.point["seed"] / (2 if row.point["router"] == "vq" else 1)
        )
    ratio = comparison(study, 4, "vq").time_ratio()
    assert ratio == seed_means([[2.0] * 4])[0]
    for row in study.rows:
        row.tokens_per_second = None
    assert comparison(study, 4, "vq").time_ratio() is None
