"""Efficiency against ranks: measured from runs, predicted from the plan, not mixed up."""

import pytest
from matplotlib.figure import Figure
from written_study import write_study

from vqmoe_megatron.studies.report.intervals import SeedMean
from vqmoe_megatron.studies.report.run_table import read_study
from vqmoe_megatron.studies.report.scaling import MeasuredLine, PredictedLine, scaling_lines
from vqmoe_megatron.studies.report.scaling_plots import draw_scaling


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
    speeds = {1: SeedMean(10.0, 1, None, 0), 2: SeedMean(19.0, 1, None, 0)}
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
