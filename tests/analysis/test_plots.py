"""The plots: drawn from real files, showing the numbers they claim to show."""

import math
import struct

import numpy as np
import pytest

from vqmoe_megatron.analysis.plots import (
    draw_code_usage,
    draw_combine_weights,
    draw_expert_load,
    draw_loss,
    draw_row_reads,
    draw_run_plots,
    read_routing,
)
from vqmoe_megatron.track.metrics_log import MetricsLog, read_metrics

NUM_LAYERS, NUM_EXPERTS, NUM_SLICES, NUM_CODES = 3, 4, 2, 8


def write_run(run_dir, with_vq=True):
    with MetricsLog(run_dir) as log:
        for iteration in range(10, 101, 10):
            record = {"iteration": iteration, "loss": 3 - iteration / 100}
            if iteration % 50 == 0:
                record |= {"val/loss": 3.1 - iteration / 100, "val/bits_per_byte": 2.5}
            if with_vq:
                for number in (2, 4, 6):
                    name = f"vq/layer_{number:02d}/combine_discrete_weight"
                    record[name] = number / 20
            log.append(record)
    load = np.array([[10, 10, 10, 10], [40, 0, 0, 0], [0, 0, 0, 0]])
    arrays = {"expert_load": load, "layer_numbers": np.array([2, 4, 6])}
    if with_vq:
        usage = np.zeros((NUM_LAYERS, NUM_SLICES, NUM_CODES), dtype=np.int64)
        usage[:, :, :4] = 5  # four codes used equally: perplexity 4
        arrays |= {"code_usage": usage, "combine_discrete_weight": np.full(NUM_LAYERS, 0.2)}
        arrays |= {
            "row_reads": np.array([[[5, 0, 9, 1], [1, 1, 1, 0]]]),
            "row_reads_of": np.array([0]),
            "row_addresses": np.array(["order 1", "order 2"]),
        }
    np.savez(run_dir / "routing.npz", **arrays)


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def test_every_plot_of_a_vq_run_is_written(tmp_path):
    write_run(tmp_path)
    written = draw_run_plots(tmp_path)
    names = ["loss", "expert_load", "code_usage", "combine_weights", "row_reads"]
    assert written == [tmp_path / "plots" / f"{name}.png" for name in names]
    for path in written:
        width, height = png_size(path)
        assert 400 < width < 2000 and 200 < height < 2000


def test_plots_without_their_input_are_skipped_with_a_reason(tmp_path, capsys):
    write_run(tmp_path, with_vq=False)
    assert [path.stem for path in draw_run_plots(tmp_path)] == ["loss", "expert_load"]
    said = capsys.readouterr().out
    assert "code_usage skipped" in said and "combine_weights skipped" in said
    reason = "no row_reads in routing.npz (no code memory, or no interval was logged)"
    assert f"row_reads skipped: {reason}" in said
    assert draw_run_plots(tmp_path / "nothing") == []
    assert capsys.readouterr().out.count("skipped:") == 5


def test_the_loss_plot_shows_the_records(tmp_path):
    write_run(tmp_path)
    records = read_metrics(tmp_path) + [{"iteration": 110, "loss": math.nan}]
    top, bottom = draw_loss(records).axes
    train, validation = top.get_lines()
    assert list(train.get_xdata()) == list(range(10, 101, 10))
    assert train.get_ydata()[0] == 2.9
    assert list(validation.get_xdata()) == [50, 100]
    assert list(bottom.get_lines()[0].get_ydata()) == [2.5, 2.5]
    assert len(draw_loss([{"iteration": 1, "loss": 2.0}]).axes) == 1


def test_the_heat_map_is_one_where_load_is_uniform(tmp_path):
    write_run(tmp_path)
    axis = draw_expert_load(read_routing(tmp_path / "routing.npz")).axes[0]
    shown = np.asarray(axis.get_images()[0].get_array())
    assert shown.tolist() == [[1, 1, 1, 1], [4, 0, 0, 0], [0, 0, 0, 0]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["2", "4", "6"]


def test_the_usage_curves_are_sorted_shares_with_their_perplexity(tmp_path):
    write_run(tmp_path)
    routing = read_routing(tmp_path / "routing.npz")
    routing["code_usage"][0, 0] = [0, 1, 0, 7, 0, 0, 0, 0]
    axis = draw_code_usage(routing).axes[0]
    first = axis.get_lines()[0].get_ydata()
    assert first[:2].tolist() == [7 / 8, 1 / 8] and np.isnan(first[2:]).all()
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    skewed = math.exp(-(7 / 8 * math.log(7 / 8) + 1 / 8 * math.log(1 / 8)))
    assert labels[0] == f"2: {skewed:.1f}, 4.0 (10 unused)"
    assert labels[1:] == ["4: 4.0, 4.0 (8 unused)", "6: 4.0, 4.0 (8 unused)"]


def test_the_combine_weights_are_one_curve_per_layer(tmp_path):
    write_run(tmp_path)
    axis = draw_combine_weights(read_metrics(tmp_path)).axes[0]
    assert [set(line.get_ydata()) for line in axis.get_lines()] == [{0.1}, {0.2}, {0.3}]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["2: 0.100", "4: 0.200", "6: 0.300"]


def test_the_row_curves_are_sorted_reads_of_each_address(tmp_path):
    write_run(tmp_path)
    routing = read_routing(tmp_path / "routing.npz")
    axis = draw_row_reads(routing).axes[0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    first, second = [line for line in axis.get_lines() if len(line.get_ydata())]
    assert first.get_ydata()[:3].tolist() == [9, 5, 1] and np.isnan(first.get_ydata()[3])
    assert list(first.get_xdata()) == [1, 2, 3, 4]
    assert second.get_ydata()[:3].tolist() == [1, 1, 1]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert labels == ["order 1: 75.0%", "order 2: 75.0%"]
    assert draw_row_reads(routing | {"row_reads": np.zeros((1, 2, 4))}).startswith("no row was")
    two = routing | {"row_reads": np.concatenate([routing["row_reads"]] * 2)}
    assert sum(bool(len(line.get_ydata())) for line in draw_row_reads(two).axes[0].get_lines()) == 4


def test_many_layers_get_a_colour_bar_instead_of_a_legend():
    names = [f"vq/layer_{number:02d}/combine_discrete_weight" for number in range(1, 31)]
    figure = draw_combine_weights([{"iteration": 1} | dict.fromkeys(names, 0.5)])
    assert figure.axes[0].get_legend() is None and len(figure.axes) == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"expert_load": np.zeros(4)},
        {"code_usage": np.zeros((3, 8))},
        {"combine_discrete_weight": np.zeros(2)},
        {"row_reads": np.ones((3, 2, 4)), "row_reads_of": np.array([0])},
        {"row_reads": np.ones((1, 2, 4))},
    ],
)
def test_wrong_shapes_are_named(tmp_path, wrong):
    np.savez(tmp_path / "routing.npz", layer_numbers=np.array([1, 2, 3]), **wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        draw_run_plots(tmp_path)


def test_pickled_objects_are_not_loaded(tmp_path):
    np.savez(tmp_path / "routing.npz", layer_numbers=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        draw_run_plots(tmp_path)
