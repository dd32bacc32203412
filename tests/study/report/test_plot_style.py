"""A legend that is longer than its plot."""

from __future__ import annotations

import io
import warnings

import pytest

pytest.importorskip("matplotlib", reason="plots are drawn with it")

from vqmoe_megatron.study.report.plot_style import PANEL_HEIGHT, legend_outside, panels


@pytest.mark.parametrize("num_entries", [3, 40])
def test_a_figure_is_as_high_as_its_legend(num_entries: int) -> None:
    figure, (axis,) = panels(1)
    for entry in range(num_entries):
        axis.plot([0, 1], [entry, entry], label=f"arm {entry}, predicted")
    legend_outside(axis)
    with warnings.catch_warnings():  # a plot without room is a warning of matplotlib's
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png")
    height = axis.get_legend().get_window_extent().height
    assert height < figure.get_figheight() * figure.dpi
    assert (figure.get_figheight() > PANEL_HEIGHT) == (num_entries > 30)
