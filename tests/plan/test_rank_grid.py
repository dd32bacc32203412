"""Rank coordinates: one drawn grid, and equality with megatron-core's own generator."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest

from vqmoe_megatron.config import ParallelConfig, RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.rank_grid import rank_grid


def layout_of(world_size: int, tp=1, pp=1, cp=1, ep=1, etp=1) -> ParallelLayout:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    return ParallelLayout.from_config(RunConfig(parallel=parallel), world_size)


def test_drawn_grid() -> None:
    # TP 2, PP 2, EP 4, 8 ranks:   rank  0  1  2  3 | 4  5  6  7
    grid = rank_grid(layout_of(8, tp=2, pp=2, ep=4))
    assert [c.rank for c in grid] == list(range(8))
    assert [c.tensor for c in grid] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [c.data for c in grid] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [c.pipeline for c in grid] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [c.expert for c in grid] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert {(c.context, c.expert_tensor, c.expert_data) for c in grid} == {(0, 0, 0)}


def coordinates(groups: list[list[int]]) -> dict[int, int]:
    """A rank's coordinate along an axis is its place in its group of that axis."""
    return {rank: place for group in groups for place, rank in enumerate(group)}


@pytest.mark.parametrize(
    "sizes",
    [
        {"world_size": 1},
        {"world_size": 8, "tp": 2, "ep": 4},
        {"world_size": 8, "tp": 2, "pp": 2, "ep": 2},
        {"world_size": 16, "tp": 2, "pp": 2, "cp": 2, "ep": 4, "etp": 2},
        {"world_size": 16, "cp": 4, "ep": 2},
        {"world_size": 24, "tp": 2, "pp": 3, "ep": 2, "etp": 2},
    ],
    ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()),
)
def test_grid_equals_megatrons_rank_generator(sizes: dict[str, int]) -> None:
    from megatron.core.parallel_state import RankGenerator, initialize_model_parallel

    layout = layout_of(**sizes)
    order = inspect.signature(initialize_model_parallel).parameters["order"].default
    dense = RankGenerator(
        tp=layout.tensor_model_parallel_size,
        ep=1,
        dp=layout.data_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        cp=layout.context_parallel_size,
        order=order,
    )
    experts = RankGenerator(
        tp=layout.expert_tensor_parallel_size,
        ep=layout.expert_model_parallel_size,
        dp=layout.expert_data_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        cp=1,
        order=order,
    )
    grid = rank_grid(layout)
    ours_and_megatrons = {
        "tensor": dense.get_ranks("tp"),
        "context": dense.get_ranks("cp"),
        "data": dense.get_ranks("dp"),
        "pipeline": dense.get_ranks("pp"),
        "expert": experts.get_ranks("ep"),
        "expert_tensor": experts.get_ranks("tp"),
        "expert_data": experts.get_ranks("dp"),
    }
    for axis, groups in ours_and_megatrons.items():
        assert {c.rank: getattr(c, axis) for c in grid} == coordinates(groups), axis


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (layout_of(6, tp=4), r"world_size % \(TP \* PP \* CP\) != 0: 6 % 4 = 2"),
        (layout_of(6, ep=4), r"world_size % \(EP \* ETP \* PP\) != 0: 6 % 4 = 2"),
        (replace(layout_of(4), world_size=3, context_parallel_size=2), "3 % 2 = 1"),
    ],
)
def test_grid_that_does_not_tile_the_world_is_refused(layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_grid(layout)
