"""Throughput and wire bytes against experts: what is drawn, and how."""

import pytest
from matplotlib.figure import Figure
from written_study import write_study

from vqmoe_megatron.study.report.plot_style import speed_axis
from vqmoe_megatron.study.report.run_table import read_study
from vqmoe_megatron.study.report.series import split_series
from vqmoe_megatron.study.report.size_plots import draw_routing, draw_speed, draw_wire


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    directory = write_study(tmp_path_factory.mktemp("sizes") / "s", sizes=(4, 8), routers=("vq",))
    return split_series(read_study(directory, "CPU").rows)


def lines_of(figure: Figure, label: str):
    (axis,) = figure.axes
    handles, labels = axis.get_legend_handles_labels()
    handle = handles[labels.index(label)]
    return handle.lines[0] if hasattr(handle, "lines") else handle


def test_measured_speed_is_solid_and_predicted_speed_hollow(series):
    figure = draw_speed(series)
    measured, predicted = lines_of(figure, "all runs"), lines_of(figure, "all runs, predicted")
    means = [mean.mean for mean in series[0].means("tokens_per_second").values()]
    assert list(measured.get_ydata()) == means and measured.get_linestyle() == "-"
    plans = [row.planned.predicted_tokens_per_second for row in series[0].rows[::2]]
    assert list(predicted.get_ydata()) == plans and predicted.get_linestyle() == "--"
    assert predicted.get_markerfacecolor() == "white"


def test_a_bar_that_reaches_zero_does_not_flatten_the_speeds(series):
    fast, slow = 50.0, 0.5  # seeds apart by so much that the interval reaches below zero
    for row, factor in zip(series[0].rows, (fast, slow, fast, slow), strict=True):
        row.tokens_per_second = 10.0 * factor
    (axis,) = draw_speed(series).axes
    assert axis.get_yscale() == "log" and axis.get_ylim()[0] == pytest.approx(252.5 / 2)


def test_wire_bytes_of_single_ranks_are_those_of_eight(series):
    figure = draw_wire(series, "CPU")
    assert figure.axes[0].get_title() == "as if on 8 ranks"
    planned = lines_of(figure, "all runs, planned").get_ydata()
    assert all(row.planned.wire_bytes_per_step == 0 for row in series[0].rows)
    assert (planned > 0).all()


def test_routing_has_a_panel_per_metric(series):
    names = [axis.get_ylabel().split(" (")[0] for axis in draw_routing(series).axes]
    assert names == ["load imbalance", "code perplexity", "dead codes"]
    assert draw_routing([]) == "no finished run has routing metrics"


def test_a_speed_of_zero_is_drawn_on_a_plain_axis():
    axis = Figure().subplots()
    speed_axis(axis, [0.0, 5.0, 100.0])
    assert axis.get_yscale() == "linear" and axis.get_ylim()[0] == 0
    speed_axis(axis, [])
    assert axis.get_yscale() == "linear"
    speed_axis(axis, [5.0, 100.0])
    assert axis.get_yscale() == "log"
