"""Where the recipe's own layout stands among the searched ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from real_model import recipe

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.hardware import PROFILES
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.plan.search import MEMORY_REASON, search_json, search_layouts

PARITY = Path(__file__).resolve().parents[2] / "recipes" / "parity.yaml"
SMALL = ["model.vocab_size=300", "model.num_layers=2", "model.num_moe_experts=4"]
HARDWARE = PROFILES["CPU"]
EVERYTHING = 1000  # more than there are


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.micro_batch_size=1"],
        ["train.micro_batch_size=1", "parallel.expert_model_parallel_size=2"],
        ["parallel.pipeline_model_parallel_size=2", "train.micro_batch_size=2"],
        ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"],
    ],
)
def test_its_rank_is_its_place_among_all(overrides) -> None:
    config = load_recipe(PARITY, [*SMALL, *overrides])
    everything = search_layouts(config, 2, HARDWARE, num_best=EVERYTHING)
    place = everything.own_rank
    own = everything.own
    assert everything.best[place - 1].layout == own.layout
    assert everything.best[place - 1].step_time == own.step_time
    seconds = [plan.step_time.total_seconds for plan in everything.best]
    num_best = 3
    few = search_layouts(config, 2, HARDWARE, num_best=num_best)
    num_faster = sum(one < own.step_time.total_seconds for one in seconds)
    assert few.own_rank == (place if place <= num_best else max(num_faster, num_best) + 1)
    assert search_json(few)["recipe"]["rank"] == few.own_rank
    assert search_json(few)["recipe"]["memory_bytes"] == own.memory_bytes


def test_without_room_it_has_no_rank() -> None:
    config = load_recipe(PARITY, [*SMALL, "train.micro_batch_size=8"])
    found = search_layouts(config, 1, HARDWARE, num_best=EVERYTHING)
    room = found.own.memory_bytes - 1
    tight = search_layouts(config, 1, replace(HARDWARE, memory_bytes=room))
    assert found.own_rank is not None and tight.own_rank is None and tight.best
    assert not tight.own.fits and tight.own.errors == ()


def test_one_that_is_not_among_the_searched_is_ranked_with_them() -> None:
    config = load_recipe(PARITY, [*SMALL, "parallel.tensor_model_parallel_size=2"])
    hardware = replace(HARDWARE, devices_per_node=1)  # TP stays within a node
    found = search_layouts(config, 2, hardware, num_best=EVERYTHING)
    others = search_layouts(load_recipe(PARITY, SMALL), 2, hardware, num_best=EVERYTHING)
    assert found.num_fitting == others.num_fitting + 1
    assert found.best[found.own_rank - 1].layout.tensor_model_parallel_size == 2


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
