"""Efficiency against ranks: measured from runs, predicted from the plan, not mixed up."""

from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from written_study import write_study

from vqmoe_megatron.study.report.intervals import SeedMean, seed_means
from vqmoe_megatron.study.report.run_table import read_study
from vqmoe_megatron.study.report.scaling import MeasuredLine, PredictedLine, scaling_lines
from vqmoe_megatron.study.report.size_plots import draw_scaling


def test_weak_scaling_is_measured_where_the_batch_grows_with_the_ranks(tmp_path):
    directory = write_study(tmp_path / "s", sizes=(8,), num_ranks=(1, 2, 4))
    rows = read_study(directory, "CPU").rows
    measured, predicted = scaling_lines(rows, "CPU")
    assert [(line.kind, line.label) for line in measured] == [
        ("weak", "smoe, 8 experts"),
        ("weak", "vq, 8 experts"),
    ]
    speeds = {row.num_ranks: row.tokens_per_second for row in rows if "-vq-" in row.name}
    points = measured[1].efficiency
    assert points[1].mean == 1.0
    assert points[4].mean == pytest.approx(speeds[4] / 4 / speeds[1], rel=1e-12)
    assert points[4].num_seeds == 2
    assert {line.label for line in predicted} == {"smoe, 8 experts", "vq, 8 experts"}


def test_strong_scaling_keeps_the_global_batch(tmp_path):
    rows = read_study(write_study(tmp_path / "s", sizes=(8,), routers=("vq",)), "CPU").rows
    rows[0].num_ranks, rows[1].num_ranks = 1, 2  # the same batch on twice the ranks
    rows[0].tokens_per_second, rows[1].tokens_per_second = 1000.0, 1500.0
    (line,), _ = scaling_lines(rows, "CPU")
    assert line.kind == "strong"
    assert line.efficiency[2].mean == 0.75 and line.efficiency[2].half_width is None


def test_predictions_alone_are_of_the_largest_models(tmp_path):
    directory = write_study(tmp_path / "s", sizes=(8, 16), seeds=(1,))
    measured, predicted = scaling_lines(read_study(directory, "CPU").rows, "CPU")
    assert measured == []
    assert {line.label for line in predicted} == {"smoe, 16 experts", "vq, 16 experts"}
    weak = next(line for line in predicted if line.kind == "weak")
    assert list(weak.efficiency) == [1, 2, 4, 8, 16, 32, 64] and weak.efficiency[1] == 1.0
    strong = next(line for line in predicted if line.kind == "strong")
    assert list(strong.efficiency) == [1, 2, 4]  # a batch of 8 in microbatches of 2


def test_predicted_points_are_hollow_and_dashed_measured_ones_filled_and_solid():
    speeds = {1: SeedMean(10.0, 1, None, 0), 2: SeedMean(9.5, 1, None, 0)}
    measured = MeasuredLine("weak", "m", speeds)
    predicted = PredictedLine("weak", "m", {1: 1.0, 2: 0.97})
    figure = draw_scaling([measured], [predicted])
    assert isinstance(figure, Figure)
    solid, dashed = (line for line in figure.axes[0].get_lines() if line.get_marker() == "o")
    assert (solid.get_linestyle(), dashed.get_linestyle()) == ("-", "--")
    assert list(solid.get_ydata()) == [1.0, 0.95] and list(dashed.get_ydata()) == [1.0, 0.97]
    assert solid.get_markerfacecolor() == solid.get_color()
    assert dashed.get_markerfacecolor() == "white"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(texts) == ["m, measured", "m, predicted"]


def test_nothing_to_draw_is_said():
    assert "same number of ranks" in draw_scaling([], [])


def test_other_layouts_are_other_lines_and_not_seeds(tmp_path):
    rows = read_study(
        write_study(tmp_path / "s", sizes=(8,), routers=("vq",), num_ranks=(1, 2)), "CPU"
    ).rows
    for row in rows:  # seed 1 and 2 become two layouts of one seed
        layout = {1: "tp", 2: "ep"}[row.point.pop("seed")]
        row.point["layout"] = layout
        row.config = replace(row.config, train=replace(row.config.train, seed=1))
        row.tokens_per_second = row.num_ranks * (100.0 if layout == "tp" else 50.0 / row.num_ranks)
    measured, _ = scaling_lines(rows, "CPU")
    efficiency = {line.label: line.efficiency[2].mean for line in measured}
    assert efficiency == {"8 experts, tp": 1.0, "8 experts, ep": 0.5}
    assert all(line.efficiency[2].num_seeds == 1 for line in measured)


def test_layouts_that_follow_the_ranks_are_one_line(tmp_path):
    rows = read_study(
        write_study(tmp_path / "s", sizes=(8,), routers=("vq",), num_ranks=(1, 2)), "CPU"
    ).rows
    for row in rows:
        row.point = {"machine": {1: "small", 2: "large"}[row.num_ranks], "seed": row.point["seed"]}
    ((line,), _) = scaling_lines(rows, "CPU")
    assert line.label == "8 experts" and line.efficiency[2].num_seeds == 2


def test_the_spread_is_pooled_per_rank(tmp_path):
    rows = read_study(
        write_study(tmp_path / "s", sizes=(8,), routers=("vq",), num_ranks=(1, 4)), "CPU"
    ).rows
    speeds = {1: iter((99.0, 101.0)), 4: iter((392.0, 408.0))}  # per rank: +-1 and +-2
    for row in rows:
        row.tokens_per_second = next(speeds[row.num_ranks])
    ((line,), _) = scaling_lines(rows, "CPU")
    (expected, _) = seed_means([[99.0, 101.0], [98.0, 102.0]])
    assert line.efficiency[1].half_width == pytest.approx(expected.half_width / 100)
    assert line.efficiency[4].half_width == line.efficiency[1].half_width


def test_without_a_naming_axis_the_largest_model_alone_is_predicted(tmp_path):
    directory = write_study(tmp_path / "s", sizes=(8, 16), routers=("vq",), seeds=(1,))
    rows = read_study(directory, "CPU").rows
    for row in rows:
        row.point = {"experts": row.point["experts"]}
    _, predicted = scaling_lines(rows, "CPU")
    assert {line.label for line in predicted} == {"16 experts"}
