"""Layer statistics to metrics: sums and means over layers, loads summed over the log window."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from vqmoe_megatron.metrics.table import check_metric_names
from vqmoe_megatron.moe.step_owner import LayerStatistics
from vqmoe_megatron.train.run_metrics import LayerWindow, layer_record, write_routing


def layer(number: int, perplexity: float, revived: float) -> LayerStatistics:
    return LayerStatistics(
        number,
        {
            "code_perplexity": torch.tensor(perplexity),
            "revived_codes": torch.tensor(revived),
            "expert_load_imbalance": torch.tensor(1.5),
            "combine_discrete_weight": torch.tensor(0.25),
        },
        expert_load=torch.tensor([1.0, 3.0]),
        code_usage=torch.tensor([[1.0, 2.0, 1.0]]),
        row_reads=torch.tensor([[1.0, 0.0], [0.0, 1.0]]) if number == 3 else None,
    )


def test_window_sums_loads_and_revivals_and_keeps_the_latest_scalars() -> None:
    window = LayerWindow()
    window.add([layer(1, 2.0, 1.0), layer(3, 4.0, 0.0)])
    window.add([layer(1, 3.0, 2.0), layer(3, 5.0, 0.0)])
    window.add([])  # a skipped step
    assert torch.equal(window.layers[1]["expert_load"], torch.tensor([2.0, 6.0]))
    assert torch.equal(window.layers[3]["code_usage"], torch.tensor([[2.0, 4.0, 2.0]]))
    assert torch.equal(window.layers[3]["row_reads"], torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    assert "row_reads" not in window.layers[1]
    assert float(window.layers[1]["revived_codes"]) == 3.0
    assert float(window.layers[1]["code_perplexity"]) == 3.0


def test_a_scalar_without_a_row_is_refused_at_the_first_step() -> None:
    odd = dataclasses.replace(layer(1, 2.0, 0.0), scalars={"entropy": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="'entropy' that has no row; known: .*code_perplexity"):
        LayerWindow().add([odd])


def test_adding_does_not_change_the_statistics_it_was_given() -> None:
    first = layer(1, 2.0, 1.0)
    window = LayerWindow()
    window.add([first])
    window.add([layer(1, 2.0, 1.0)])
    assert torch.equal(first.expert_load, torch.tensor([1.0, 3.0]))


def test_means_and_sums_over_layers_under_legal_names() -> None:
    layers = {
        1: {"code_perplexity": np.float64(2.0), "dead_codes": np.float64(3.0)},
        3: {"code_perplexity": np.float64(6.0), "dead_codes": np.float64(4.0)},
    }
    record = layer_record(layers)
    assert record["vq/code_perplexity"] == 4.0
    assert record["vq/dead_codes"] == 7.0
    assert record["vq/layer_03/code_perplexity"] == 6.0
    check_metric_names(["iteration", *record])


@pytest.mark.parametrize("has_codes", [True, False])
def test_routing_file(tmp_path: Path, has_codes: bool) -> None:
    entry = {
        "expert_load": np.array([1.0, 3.0]),
        "combine_discrete_weight": np.float64(0.25),
    }
    if has_codes:
        entry["code_usage"] = np.array([[1.0, 2.0]])
    write_routing(tmp_path / "routing.npz", {2: entry})
    with np.load(tmp_path / "routing.npz", allow_pickle=False) as arrays:
        assert arrays["layer_numbers"].tolist() == [2]
        assert arrays["expert_load"].tolist() == [[1.0, 3.0]]
        assert ("code_usage" in arrays) == has_codes


def test_reads_of_rows_are_in_the_routing_file_with_their_layers_and_addresses(
    tmp_path: Path,
) -> None:
    load = {"expert_load": np.array([1.0, 3.0]), "combine_discrete_weight": np.float64(0.25)}
    reads = {"row_reads": np.array([[1.0, 2.0], [3.0, 0.0]])}
    write_routing(tmp_path / "routing.npz", {0: reads, 1: load, 2: load}, ("order 1", "context"))
    with np.load(tmp_path / "routing.npz", allow_pickle=False) as arrays:
        assert arrays["layer_numbers"].tolist() == [1, 2]
        assert arrays["row_reads"].tolist() == [reads["row_reads"].tolist()]
        assert arrays["row_reads_of"].tolist() == [0]
        assert arrays["row_addresses"].tolist() == ["order 1", "context"]


def test_no_layers_write_no_file(tmp_path: Path) -> None:
    write_routing(tmp_path / "routing.npz", {})
    assert not (tmp_path / "routing.npz").exists()
