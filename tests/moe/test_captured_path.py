"""The captured discrete path against the same layer without graphs: outputs, every gradient, steps.

Graphs are recorded, not CUDA's: the recorder fails on any shape, operation or address that a graph
would get wrong.
"""

from __future__ import annotations

import pytest
import torch
from fast_path import BASE, CASES, STATIC, both_ways, check
from tiny_layer import HIDDEN, build_layer, draw_parameters

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.runtime.recorded_graph import RecordedGraph


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_a_captured_path_trains_like_the_path(ranks, name: str) -> None:  # noqa: ANN001
    for plain, captured in ranks(1).run(both_ways, CASES[name]):
        check(plain, captured)
        assert captured["is_captured"] and not plain["is_captured"]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if c.get("straight_through") in STATIC]
)
def test_the_table_is_captured_with_its_collectives(ranks, name: str) -> None:  # noqa: ANN001
    layout = {"expert_model_parallel_size": 2}
    for plain, captured in ranks(2).run(both_ways, CASES[name], layout=layout):
        check(plain, captured)
        assert captured["is_captured"]


def evaluated_between() -> bool:
    """In a rank: an evaluation between two steps neither uses nor disturbs the graphs."""
    vq = VQConfig(**BASE, straight_through="none")
    layer = build_layer(vq, draw_parameters(vq), new_graph=RecordedGraph)
    x = torch.randn(3, 2, HIDDEN, dtype=torch.float64, requires_grad=True)
    outputs = []
    for _ in range(3):
        output, _ = layer(x)
        output.sum().backward()
        with torch.no_grad():
            outputs.append(torch.equal(layer.eval()(x)[0], layer(x)[0]))
        outputs.append(torch.allclose(layer(x)[0], output, rtol=1e-12, atol=1e-12))
        layer.train()
    return all(outputs)


@pytest.mark.distributed
def test_evaluation_takes_no_graph(ranks) -> None:  # noqa: ANN001
    assert ranks(1).run(evaluated_between) == [True]
