"""Each thing that keeps the discrete path out of a graph is told, and nothing else is."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.capture import (
    capture_obstacles,
    overlap_obstacles,
    starts_rows,
    starts_tables,
)
from vqmoe_megatron.plan.layout import check_layout

RECIPE = "recipes/quickstart.yaml"
FITS = [
    "vq.path=dual", "code_memory.num_rows=0", "parallel.expert_model_parallel_size=1",
    "model.vocab_size=300", "model.bf16=true",
]  # fmt: skip
GATHERED = [
    "optimizer.overlap_grad_reduce=true",
    "optimizer.overlap_param_gather=true",
    "optimizer.use_distributed_optimizer=true",
]


@pytest.mark.parametrize(
    ("overrides", "world_size", "reasons"),
    [
        ([], 1, []),
        (["vq.path=discrete"], 1, []),
        (["parallel.expert_model_parallel_size=2", "vq.straight_through=identity"], 2, []),
        (["parallel.expert_model_parallel_size=2"], 2, [r"vq.straight_through=token with EP"]),
        (["vq.execution=tokens"], 1, ["by token dispatch"]),
        (["vq.table_per_step=true"], 1, ["vq.table_per_step"]),
        (["vq.overlap_table=true"], 1, ["vq.overlap_table"]),
        (["parallel.pipeline_model_parallel_size=2"], 2, ["PP = 2"]),
        (
            ["model.recompute_granularity=selective", "model.recompute_modules=[moe]"],
            1,
            ["recomputed MoE layers"],
        ),
        (["model.recompute_granularity=selective"], 1, []),
        (GATHERED, 1, ["optimizer.overlap_param_gather"]),
        (["model.bf16=false"], 1, ["model.bf16=false"]),
    ],
)
def test_every_obstacle_is_named(overrides: list[str], world_size: int, reasons: list[str]) -> None:
    config = load_recipe(RECIPE, [*FITS, "train.cuda_graphs=true", *overrides])
    layout = check_layout(config, world_size, "cpu")
    found = list(capture_obstacles(config, layout))
    assert len(found) == len(reasons)
    for told, expected in zip(found, reasons, strict=True):
        assert expected in told


def test_a_cpu_has_one_stream_and_gathered_weights_need_one() -> None:
    config = load_recipe(RECIPE, [*FITS, "vq.overlap_table=true"])
    assert starts_tables(config)
    assert len(list(overlap_obstacles(config, has_cuda=False))) == 1
    assert list(overlap_obstacles(config, has_cuda=True)) == []
    config = load_recipe(RECIPE, [*FITS, "vq.overlap_table=true", *GATHERED])
    assert not starts_tables(config)
    (reason,) = overlap_obstacles(config, has_cuda=True)
    assert "optimizer.overlap_param_gather" in reason


def test_rows_of_a_memory_wait_for_gathered_weights() -> None:
    memory = ["vq.path=continuous", "code_memory.num_rows=64"]
    assert starts_rows(load_recipe(RECIPE, [*FITS, *memory]))
    assert not starts_rows(load_recipe(RECIPE, [*FITS, *memory, *GATHERED]))
    assert not starts_rows(load_recipe(RECIPE, [*FITS, "code_memory.num_rows=0"]))


def test_recomputed_layers_build_their_own_tables() -> None:
    moe = ["model.recompute_granularity=selective", "model.recompute_modules=[moe]"]
    config = load_recipe(RECIPE, [*FITS, "vq.overlap_table=true", *moe])
    assert not starts_tables(config)
    (reason,) = overlap_obstacles(config, has_cuda=True)
    assert "recompute_modules=moe" in reason
