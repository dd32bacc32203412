"""The plan as one object: figures of legal layouts, equations of the others."""

from __future__ import annotations

import json

import pytest
from real_model import recipe

from vqmoe_megatron.plan.run_plan import plan_json, plan_run
from vqmoe_megatron.plan.step_wire import step_wire

EP2 = ["parallel.expert_model_parallel_size=2"]


def test_figures_agree_with_their_parts() -> None:
    plan = plan_run(recipe(EP2), 2, "CPU")
    assert plan.errors == () and plan.fits
    assert plan.parameters.active < plan.parameters.total
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
