"""What a plan refuses because no formula counts it."""

from __future__ import annotations

import pytest
from real_model import recipe

from vqmoe_megatron.plan.hardware import hardware_profile
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.plan.search import search_layouts
from vqmoe_megatron.simulate.simulated_step import simulate_step

CP2 = ["parallel.context_parallel_size=2"]
WORDS = "does not count what context-parallel ranks gather"


def test_context_parallelism_is_trained_and_not_planned() -> None:
    plan = plan_run(recipe(CP2), 2, "CPU")
    (error,) = plan.errors
    assert WORDS in error
    with pytest.raises(ValueError, match=f"cannot be planned on 2 ranks:\n.*{WORDS}"):
        _ = plan.wire_bytes_per_step


def test_a_broken_rule_comes_first() -> None:
    plan = plan_run(recipe(CP2), 3, "CPU")
    assert len(plan.errors) == 1
    assert "world_size % (TP * PP * CP" in plan.errors[0]
    assert plan.refusal == "the recipe cannot run on 3 ranks"


def test_no_layout_of_a_search_keeps_it() -> None:
    found = search_layouts(recipe(CP2), 2, hardware_profile("CPU"))
    assert found.best == ()
    assert any("context_parallel_size" in reason for reason in found.dropped)


def test_a_simulation_refuses_it() -> None:
    with pytest.raises(ValueError, match=WORDS):
        simulate_step(recipe(CP2), 2)
