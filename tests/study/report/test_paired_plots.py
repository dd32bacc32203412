"""The plots of arms: what is drawn where, and what is said where nothing can be."""

from __future__ import annotations

import pytest
from paired_study import ARMS, paired_study

from vqmoe_megatron.study.baselines import Arms
from vqmoe_megatron.study.report.paired import FINAL_BITS, compare_arms
from vqmoe_megatron.study.report.paired_plots import draw_differences, draw_figure_of_arms
from vqmoe_megatron.study.report.plot_style import series_colour
from vqmoe_megatron.study.report.series import split_series

BASELINES = Arms("router", ARMS, ("smoe", "vq"))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return paired_study(tmp_path_factory.mktemp("paired_plots") / "s", seeds=(1, 2))


def bars(axis) -> dict[str, tuple[list[float], object]]:
    handles, labels = axis.get_legend_handles_labels()
    lines = (handle.lines[0] for handle in handles)
    return {
        label: (list(line.get_ydata()), line.get_color())
        for label, line in zip(labels, lines, strict=True)
    }


def test_a_panel_per_baseline_with_a_zero_line_and_an_arm_keeps_its_colour(study) -> None:
    found = compare_arms(study, BASELINES)
    figure = draw_differences(found, BASELINES, FINAL_BITS, "bits", lambda one: one.baseline)
    first, second = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["smoe", "vq"]
    assert set(bars(first)) == {"smoe_top2", "vq"} and set(bars(second)) == {"smoe", "smoe_top2"}
    values, colour = bars(first)["vq"]
    expected = [o.mean(FINAL_BITS).mean for o in found if (o.arm, o.baseline) == ("vq", "smoe")]
    assert values == expected and colour == series_colour(2)
    assert bars(first)["smoe_top2"][1] == bars(second)["smoe_top2"][1]
    for axis in figure.axes:
        assert axis.get_xscale() == "log"
        assert any(list(line.get_ydata()) == [0.0, 0.0] for line in axis.lines)


def test_nothing_to_draw_is_said(study) -> None:
    arms = Arms("router", ARMS, ("smoe",))
    drawn = draw_differences([], arms, FINAL_BITS, "bits", lambda one: "")
    assert drawn == "no two finished runs make a pair"
    assert draw_figure_of_arms([], FINAL_BITS, "bits") == (
        "no finished run has a finite validation loss"
    )


def test_bits_per_byte_has_a_line_per_arm(study) -> None:
    (axis,) = draw_figure_of_arms(split_series(study.rows), FINAL_BITS, "bits per byte").axes
    means = [mean.mean for mean in split_series(study.rows)[2].means(FINAL_BITS).values()]
    assert bars(axis)["vq"][0] == means and list(bars(axis)) == list(ARMS)
    assert axis.get_ylabel() == "validation loss (bits per byte)"
