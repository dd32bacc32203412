"""What of the losses is drawn, and how."""

import math

from written_study import NUM_STEPS, write_study

from vqmoe_megatron.study.report.loss_plots import (
    NO_LOSS,
    draw_loss_curves,
    draw_loss_experts,
    fit_series,
)
from vqmoe_megatron.study.report.run_table import read_study
from vqmoe_megatron.study.report.series import split_series

DIVERGED = "experts8-vq-ranks1-seed2"


def series_of(directory, diverged):
    write_study(directory, sizes=(4, 8), routers=("vq",), diverged=diverged)
    return split_series(read_study(directory, "CPU").rows)


def test_a_diverged_run_is_dotted_as_far_as_its_loss_is_finite(tmp_path):
    figure = draw_loss_curves(series_of(tmp_path / "s", {DIVERGED: 16}), by_flops=False)
    drawn = [line for line in figure.axes[0].get_lines() if len(line.get_xdata())]
    dotted = [line for line in drawn if line.get_linestyle() == ":"]
    solid = [line for line in drawn if line.get_linestyle() == "-"]
    assert [len(line.get_xdata()) for line in dotted] == [3]
    assert [len(line.get_xdata()) for line in solid] == [NUM_STEPS // 4] * 2
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["4", "8", "unfinished or diverged"]


def test_final_losses_that_are_not_finite_are_no_dots(tmp_path):
    series = series_of(tmp_path / "s", {DIVERGED: 16})
    figure = draw_loss_experts(series, fit_series(series))
    dots = [line for line in figure.axes[0].get_lines() if line.get_marker() == "."]
    assert [len(line.get_ydata()) for line in dots] == [2, 1]
    assert all(math.isfinite(loss) for line in dots for loss in line.get_ydata())


def test_a_study_whose_runs_all_diverged_says_so(tmp_path):
    names = [f"experts{size}-vq-ranks1-seed{seed}" for size in (4, 8) for seed in (1, 2)]
    series = series_of(tmp_path / "s", dict.fromkeys(names, 16))
    assert draw_loss_experts(series, fit_series(series)) == NO_LOSS
    assert "finite" in NO_LOSS
