"""What of a record must come again bit by bit after a resume."""

from __future__ import annotations

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.gpu_proof.train_run import ARMS, COMMON, FULL, RECIPE, SHALLOW, TINY, _results
from vqmoe_megatron.plan.capture import capture_obstacles
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.run_plan import plan_run


def test_losses_and_layers_are_results_times_and_memory_are_not() -> None:
    record = {
        "iteration": 3,
        "loss": 2.0,
        "grad_norm": 1.0,
        "vq/layer_01/dead_codes": 0,
        "vq/layer_01/assignment_change_rate": 0.5,
        "vq/assignment_change_rate": 0.5,
        "vq/layer_01/codes_in_use": 7,
        "step_time_ms": 10.0,
        "timestamp_ms": 1,
        "memory/peak_rss_bytes": 5,
        "system/gpu_power_watts": 300.0,
    }
    assert set(_results(record)) == {"iteration", "loss", "grad_norm", "vq/layer_01/dead_codes"}


def test_every_size_fits_one_h100_by_the_plan() -> None:
    for size in (FULL, SHALLOW, TINY):
        for overrides in ARMS.values():
            config = load_recipe(RECIPE, [*COMMON, *size, *overrides])
            plan = plan_run(config, 1, "H100")
            assert not plan.errors
            assert plan.fits
            assert config.model.num_moe_experts == 64


def test_the_captured_arm_has_no_obstacle() -> None:
    overrides = ARMS["VQMoE, captured"]
    config = load_recipe(RECIPE, [*COMMON, *FULL, *overrides])
    assert config.train.cuda_graphs
    assert list(capture_obstacles(config, check_layout(config, 1, "cpu"))) == []
