"""The kernels of whole steps: their operations are those that are counted, each on its unit."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from real_model import recipe

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.run_plan import RunPlan, plan_json, plan_run
from vqmoe_megatron.plan.search_kernels import (
    UNCERTAIN_SHARE_PERCENT,
    plain_search,
    split_search,
)
from vqmoe_megatron.plan.shape import LayerShape

BILLION = Path(__file__).resolve().parents[2] / "recipes" / "scale" / "billion_64.yaml"
NOT_COUNTED = ("probes", "similarity of candidates")  # of the codebook step, not model operations


def operations(plan: RunPlan) -> Counter[str]:
    """By unit; of the slowest stage in a step."""
    found: Counter[str] = Counter()
    for row in plan.step_time.rows:
        for kernel in row.kernels:
            if kernel.name not in NOT_COUNTED:
                found[kernel.unit] += kernel.operations
    return found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["vq.path=continuous", "model.moe_router_topk=2"],
        ["vq.path=discrete"],
        ["vq.execution=tokens", "vq.num_code_slices=2", "vq.quantizer=product"],
        ["vq.quantizer=low_dim", "vq.code_dim=8", "parallel.expert_model_parallel_size=2"],
        ["vq.table_per_step=true", "vq.straight_through=group", "model.moe_layer_freq=2"],
        ["parallel.pipeline_model_parallel_size=2", "vq.code_input=learned"],
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true",
         "parallel.expert_tensor_parallel_size=2", "model.gated_linear_unit=true"],
        ["model.recompute_granularity=full", "model.recompute_method=block",
         "model.recompute_num_layers=1", "vq.table_per_step=true"],
        ["code_memory.num_rows=64", "code_memory.num_codes=40", "code_memory.gate=token",
         "code_memory.codes=embedding", "code_memory.num_context_codes=10",
         "code_memory.values=experts",
         "parallel.pipeline_model_parallel_size=2", "code_memory.layers=[1, 3]"],
        ["code_memory.num_rows=64", "code_memory.num_codes=40", "code_memory.codes=hidden",
         "model.recompute_granularity=full", "model.recompute_method=block",
         "model.recompute_num_layers=1", "parallel.expert_model_parallel_size=2"],
        ["model.recompute_granularity=selective", "model.moe_layer_freq=2",
         "model.recompute_modules=[core_attn,mlp,moe]", "model.add_bias_linear=false"],
    ],
)  # fmt: skip
def test_every_counted_operation_is_some_kernel_s(overrides) -> None:
    plan = plan_run(recipe(overrides), 2, "CPU")
    rank = plan.step_time.pipeline_rank
    assert operations(plan) == {
        "fp32_fma": plan.figures.flops.per_rank[rank].total,
        "bandwidth": 0,
    }


@pytest.mark.parametrize("hardware", ["H100", "H200", "B200", "CPU"])
def test_an_fp32_recipe_runs_on_the_fp32_unit(hardware: str) -> None:
    plan = plan_run(recipe(["model.bf16=false"]), 1, hardware)
    units = {k.unit for row in plan.step_time.rows for k in row.kernels if k.operations}
    assert units == {"fp32_fma"}  # codes have fewer than 64 columns


def billion() -> RunPlan:
    """With the paper's layer, which searches."""
    of_paper = ["code_memory.num_rows=0", "vq.path=dual"]
    return plan_run(load_recipe(BILLION, of_paper), 16, "H100")


def test_a_bf16_recipe_s_search_and_router_are_not_all_on_the_tensor_cores() -> None:
    plan = billion()
    counted = plan.figures.flops.per_rank[0].total
    tokens, layers = 32768, 16
    search = layers * 2 * tokens * 896 * 1024
    router = layers * 4 * tokens * 1024 * 64  # backward, in moe_router_dtype=fp32
    again = search * UNCERTAIN_SHARE_PERCENT // 100
    found = operations(plan)
    assert found["fp32_fma"] == pytest.approx(again + router)
    assert found["bf16_tensor_core"] == pytest.approx(counted + search - router)


def test_billion_64_has_its_rows_and_they_are_the_step() -> None:
    time = billion().step_time
    rows = {row.part: row for row in time.rows}
    assert list(rows) == [
        "attention", "expert GEMMs", "code rows", "router and gate", "dispatch", "search",
        "combine", "straight-through", "codebook statistics", "output layer", "element-wise",
        "recompute",
    ]  # fmt: skip
    assert sum(time.parts.values()) == pytest.approx(time.total_seconds)
    grouped = [k for k in rows["expert GEMMs"].kernels if k.operations]
    experts = sum(kernel.operations for kernel in grouped)
    assert experts / 16 == pytest.approx(1.9e11, rel=0.02)  # of a layer
    assert experts / 16 / 800e12 == pytest.approx(0.24e-3, rel=0.02)
    by_bound = rows["expert GEMMs"].seconds_by_bound  # 8,192 rows over 8 experts of width 320
    assert max(by_bound, key=lambda bound: by_bound[bound]) == "bandwidth"


def test_the_search_before_and_after_is_what_the_documents_say() -> None:
    plan = billion()
    layer = LayerShape.from_config(plan.config, plan.layout)
    times = 16 * 4  # layers, microbatches
    before, after = (
        times * sum(kernel.seconds(plan.hardware) for kernel in search)
        for search in (plain_search(layer), split_search(layer))
    )
    (row,) = (row for row in plan.step_time.rows if row.part == "search")
    assert row.seconds == pytest.approx(after)
    for document in ("operations.md", "experiments.md"):
        text = (BILLION.parents[2] / "docs" / document).read_text("utf-8")
        assert f"{before * 1e3:.1f}" in text and f"{after * 1e3:.1f}" in text


def test_json_s_rows_add_up() -> None:
    described = plan_json(billion())["step_time"]
    rows = sum(row["seconds"] for row in described["rows"])
    others = ("exposed_communication_seconds", "bubble_seconds", "optimizer_seconds")
    assert described["compute_seconds"] == pytest.approx(rows)
    assert described["total_seconds"] == pytest.approx(rows + sum(described[o] for o in others))
    for row in described["rows"]:
        assert row["seconds"] == pytest.approx(sum(k["seconds"] for k in row["kernels"]))
        assert row["seconds"] == pytest.approx(sum(row["seconds_by_bound"].values()))


def kernels_of(overrides: list[str], part: str) -> set[tuple[str, str]]:
    rows = plan_run(recipe(overrides), 1, "CPU").step_time.rows
    return {(k.name, k.phase) for row in rows if row.part == part for k in row.kernels}


def test_a_kept_table_is_built_once_per_step() -> None:
    each = kernels_of([], "code rows")
    once = kernels_of(["vq.table_per_step=true"], "code rows")
    assert {phase for _, phase in each} == {"forward", "backward"}
    assert {phase for _, phase in once} == {"step"}


def test_recompute_repeats_forward_passes_alone() -> None:
    full = ["model.recompute_granularity=full", "model.recompute_method=uniform",
            "model.recompute_num_layers=1"]  # fmt: skip
    repeated = kernels_of(full, "recompute")
    assert {phase for _, phase in repeated} == {"forward"}
    names = {name for name, _ in repeated}
    assert "search: fp32 products" in names and "attention: core attention" in names
    selective = ["model.recompute_granularity=selective"]
    core = "attention: core attention"
    assert {name for name, _ in kernels_of(selective, "recompute")} == {core}
    selective.append("model.attention_dropout=0.1")
    names = {name for name, _ in kernels_of(selective, "recompute")}
    assert names == {core, f"{core} scores"}
    assert kernels_of([], "recompute") == set()
