"""The plan as one object: figures of legal layouts, equations of the others, owners, search."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from real_model import recipe

from vqmoe_megatron.plan.code_owners import code_owners
from vqmoe_megatron.plan.hardware import PROFILES
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.layout_search import MEMORY_REASON, search_layouts
from vqmoe_megatron.plan.ownership import owner_of_code
from vqmoe_megatron.plan.plan_json import plan_json, search_json
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.plan.step_wire import step_wire

EP2 = ["parallel.expert_model_parallel_size=2"]


def test_figures_agree_with_their_parts() -> None:
    plan = plan_run(recipe(EP2), 2, "CPU")
    assert plan.errors == () and plan.fits
    assert plan.num_active_parameters < plan.parameters.total
    assert plan.memory_bytes == max(stage.peak for stage in plan.figures.memory)
    assert plan.flops_per_token * plan.tokens_per_step == pytest.approx(plan.flops_per_step)
    assert plan.wire_bytes_per_step >= step_wire(plan.config, plan.layout).sent_bytes > 0
    state = plan.figures.memory[0].state
    assert plan.memory_bytes > state.total > state.weights + state.gradients


def test_a_layout_that_cannot_run_has_equations_and_no_figures() -> None:
    plan = plan_run(recipe(EP2), 3)
    assert any("world_size % (EP * ETP * PP = 2 * 1 * 1) != 0: 3 % 2 = 1" in e for e in plan.errors)
    with pytest.raises(ValueError, match="cannot run on 3 ranks:\n  - world_size"):
        _ = plan.flops_per_token
    described = plan_json(plan)
    assert described["errors"] == list(plan.errors) and described["rank_grid"] == []


def test_json_holds_the_contract() -> None:
    described = json.loads(json.dumps(plan_json(plan_run(recipe(EP2), 4, "H200"), ["one"])))
    assert [place["rank"] for place in described["rank_grid"]] == [0, 1, 2, 3]
    assert described["errors"] == []
    assert described["parameters"]["total"] == sum(
        described["parameters"]["total_by_part"].values()
    )
    assert described["memory_bytes"]["peak"] == described["memory_bytes"]["stages"][0]["peak"]
    assert described["flops_per_step"]["total"] > 0
    assert sum(described["wire_bytes_per_step"]["by_axis"].values()) == pytest.approx(
        described["wire_bytes_per_step"]["total"]
    )
    assert "one" in described["assumptions"]
    assert described["hardware"]["is_measured"] is described["step_time"]["is_measured"] is False


def test_unknown_vocabulary() -> None:
    with pytest.raises(ValueError, match="model.vocab_size is not set"):
        plan_run(recipe(["model.vocab_size=null"]), 1)


@pytest.mark.parametrize("num_codes", [16, 13])
def test_owners_have_the_codes_of_their_experts(num_codes: int) -> None:
    config = recipe([f"vq.num_codes={num_codes}", "parallel.expert_model_parallel_size=4"])
    owned = [0] * 4
    for code in range(num_codes):
        owned[owner_of_code(code, 8, 4)] += 1
    owners = code_owners(config, check_layout(config, 4, "cpu"))
    assert [owner.num_code_rows for owner in owners] == owned
    assert [(o.first_expert, o.last_expert) for o in owners] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    continuous = recipe(["vq.path=continuous"])
    (owner,) = code_owners(continuous, check_layout(continuous, 1, "cpu"))
    assert owner.num_code_rows == 0


def test_search_finds_the_fastest_legal_layout() -> None:
    config = recipe(["model.num_layers=2", "model.num_moe_experts=4"])
    result = search_layouts(config, 2, PROFILES["CPU"])
    seconds = [plan.step_time.total_seconds for plan in result.best]
    assert seconds == sorted(seconds) and len(result.best) == 10
    assert all(plan.errors == () and plan.world_size == 2 for plan in result.best)
    assert result.num_tried == result.num_fitting + sum(result.dropped.values())
    assert "num_layers % (PP * VPP)" in result.dropped
    everything = search_layouts(config, 2, PROFILES["CPU"], num_best=1000)
    assert len(everything.best) == everything.num_fitting == result.num_fitting
    fastest = min(plan.step_time.total_seconds for plan in everything.best)
    assert seconds[0] == pytest.approx(fastest)
    assert search_json(result)["best"][0]["step_time"]["total_seconds"] == seconds[0]


def test_search_keeps_what_the_recipe_needs_on_one_rank() -> None:
    needs = ["model.bf16=true", "vq.codebook_update=gradient", "model.num_layers=1"]
    config = recipe([*needs, "optimizer.use_distributed_optimizer=true"])
    assert plan_run(config, 1).errors == ()
    result = search_layouts(config, 1, PROFILES["CPU"])
    assert result.num_fitting == result.num_tried > 0


def test_search_says_when_nothing_fits() -> None:
    small = replace(PROFILES["CPU"], memory_bytes=1000)
    result = search_layouts(recipe(["model.num_layers=1"]), 1, small)
    assert result.best == () and result.dropped.keys() == {MEMORY_REASON}
    assert result.smallest_peak_bytes > 1000
    with pytest.raises(ValueError, match="world_size=0 must be at least 1"):
        search_layouts(recipe([]), 0, small)
