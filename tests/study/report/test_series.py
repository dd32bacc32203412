"""Which runs belong together, and that only finished ones are averaged."""

from dataclasses import replace

import pytest
from written_study import NUM_STEPS, config_of, loss_at, write_study

from vqmoe_megatron.config import OptimizerSection
from vqmoe_megatron.study.report.run_table import RunRow, read_study
from vqmoe_megatron.study.report.series import (
    figure_of,
    mean_curves,
    single_curves,
    split_series,
)


def row_at(path, point, **settings) -> RunRow:
    config = config_of(path, point["experts"], "vq", point.get("seed", 1))
    return RunRow(str(point), point, 1, state="finished", config=replace(config, **settings))


def test_router_names_the_series_and_seeds_make_the_mean(tmp_path):
    states = {"experts8-vq-ranks1-seed2": ("failed", 8)}
    study = read_study(write_study(tmp_path / "s", sizes=(4, 8), states=states), "CPU")
    smoe, vq = split_series(study.rows)
    assert (smoe.label, vq.label) == ("smoe", "vq")
    means = vq.means("final_val_loss")
    losses = [loss_at(4, "vq", seed, NUM_STEPS) for seed in (1, 2)]
    assert means[4].mean == pytest.approx(sum(losses) / 2, rel=1e-12)
    assert (means[4].num_seeds, means[8].num_seeds) == (2, 1)
    assert means[8].mean == loss_at(8, "vq", 1, NUM_STEPS)
    assert [row.name for row, _, _ in single_curves(vq)] == ["experts8-vq-ranks1-seed2"]


def test_axes_that_follow_the_experts_name_no_series(tmp_path):
    rows = [
        row_at(tmp_path, {"experts": experts, "codes": "4 * experts", "width": width})
        for experts in (4, 8)
        for width in (16, 32)
    ]
    rows += [row_at(tmp_path, {"experts": 16, "codes": "64", "width": 16})]
    assert [one.label for one in split_series(rows)] == ["width 16", "width 32"]


def test_two_naming_axes_make_one_name(tmp_path):
    rows = [
        row_at(tmp_path, {"experts": 4, "router": router, "codes": codes, "seed": 1})
        for router in ("a", "b")
        for codes in (16, 32)
    ]
    labels = [one.label for one in split_series(rows)]
    assert labels == ["a, codes 16", "a, codes 32", "b, codes 16", "b, codes 32"]


def test_runs_that_differ_in_seed_alone_are_one_series(tmp_path):
    rows = [row_at(tmp_path, {"experts": 4, "seed": seed}) for seed in (1, 2)]
    (one,) = split_series(rows)
    assert one.label == "all runs" and len(one.rows) == 2


def test_curves_are_means_at_common_evaluations(tmp_path):
    study = read_study(write_study(tmp_path / "s", sizes=(4, 8), routers=("vq",)), "CPU")
    study.rows[0].records = [r for r in study.rows[0].records if r["iteration"] != 8]
    (series,) = split_series(study.rows)
    four, eight = mean_curves(series)
    tokens = 8 * 32  # of a step
    assert four.num_tokens == [tokens * i for i in range(4, NUM_STEPS + 1, 4) if i != 8]
    assert eight.num_tokens[1] == 8 * tokens
    expected = (loss_at(4, "vq", 1, 12) + loss_at(4, "vq", 2, 12)) / 2
    assert four.means[1].mean == pytest.approx(expected, rel=1e-12)
    # four and eight experts share their spread where both are evaluated
    assert (four.means[1].num_degrees_of_freedom, eight.means[1].num_degrees_of_freedom) == (2, 1)


def test_figures_that_are_not_finite_are_left_out(tmp_path):
    row = row_at(tmp_path, {"experts": 4})
    row.final_val_loss = float("nan")
    assert figure_of(row, "final_val_loss") is None
    assert split_series([row])[0].means("final_val_loss") == {}


DIVERGED = "experts8-vq-ranks1-seed2"


def test_a_diverged_seed_shortens_no_curve(tmp_path):
    directory = write_study(tmp_path / "s", sizes=(4, 8), routers=("vq",), diverged={DIVERGED: 16})
    (series,) = split_series(read_study(directory, "CPU").rows)
    four, eight = mean_curves(series)
    assert eight.num_tokens == four.num_tokens and len(eight.num_tokens) == NUM_STEPS // 4
    assert {mean.num_seeds for mean in eight.means} == {1}  # before it diverged, too
    assert [mean.mean for mean in eight.means] == [
        loss_at(8, "vq", 1, iteration) for iteration in range(4, NUM_STEPS + 1, 4)
    ]
    ((row, tokens, losses),) = single_curves(series)
    assert row.name == DIVERGED and tokens == four.num_tokens[:3]
    assert losses == [loss_at(8, "vq", 2, iteration) for iteration in (4, 8, 12)]


def test_a_seed_that_never_had_a_finite_loss_drops_no_size(tmp_path):
    directory = write_study(tmp_path / "s", sizes=(4, 8), routers=("vq",), diverged={DIVERGED: 0})
    (series,) = split_series(read_study(directory, "CPU").rows)
    assert [curve.num_moe_experts for curve in mean_curves(series)] == [4, 8]
    assert single_curves(series) == []


NAMED_SEEDS = {"a": 1, "b": 2}


def named_seed_rows(path, settings_of=lambda name: {}):
    rows = []
    for router in ("smoe", "vq"):
        for name, seed in NAMED_SEEDS.items():
            config = replace(config_of(path / name, 4, router, seed), **settings_of(name))
            rows.append(RunRow(name, {"router": router, "repeat": name}, 1, "finished", "", config))
    return rows


def test_seeds_that_are_named_variants_make_the_mean(tmp_path):
    rows = named_seed_rows(tmp_path)  # in other directories, which is no setting of the training
    assert [one.label for one in split_series(rows)] == ["smoe", "vq"]
    rows[0].config = replace(rows[0].config, model=replace(rows[0].config.model, vocab_size=None))
    assert len(split_series(rows)) == 2  # one that has not read its corpus yet
    for row in rows:
        row.final_val_loss = 2.0
    assert [one.means("final_val_loss")[4].num_seeds for one in split_series(rows)] == [2, 2]


def test_variants_that_change_more_than_the_seed_are_series(tmp_path):
    settings = {"a": OptimizerSection(lr=1e-3), "b": OptimizerSection(lr=3e-3)}
    rows = named_seed_rows(tmp_path, lambda name: {"optimizer": settings[name]})
    assert [one.label for one in split_series(rows)] == ["smoe, a", "smoe, b", "vq, a", "vq, b"]
    rows = named_seed_rows(tmp_path)
    for row in rows:
        row.num_ranks = {"a": 1, "b": 2}[row.point["repeat"]]
    assert len(split_series(rows)) == 4


def test_values_that_are_the_seed_by_chance_are_no_seeds(tmp_path):
    rows = [row_at(tmp_path, {"experts": 4, "seed": seed}) for seed in (2, 4)]
    for row in rows:  # train.seed=1 * model.num_layers
        layers = row.config.train.seed
        row.point = {"experts": 4, "model.num_layers": layers}
        row.config = replace(row.config, model=replace(row.config.model, num_layers=layers))
    assert len(split_series(rows)) == 2


def test_an_axis_that_goes_along_with_the_seed_names_the_series(tmp_path):
    """Points left out of the grid may pair every router with one seed."""
    rows = named_seed_rows(tmp_path)
    smoe, vq = split_series([rows[0], rows[3]])
    assert (smoe.label, vq.label) == ("smoe, a", "vq, b")
    for row in rows:
        row.point = {"router": row.point["router"], "seed": row.config.train.seed}
    assert [one.label for one in split_series([rows[0], rows[3]])] == ["smoe", "vq"]
    del rows[0].point["seed"]  # not every run has the axis: it tells runs apart
    assert [one.label for one in split_series(rows[2:] + rows[:1])] == [
        "vq, seed 1",
        "vq, seed 2",
        "smoe",
    ]
