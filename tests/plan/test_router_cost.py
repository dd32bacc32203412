"""What the plan says of each baseline router against the real model's tensors and operations."""

from __future__ import annotations

import pytest
from baseline_routers import CONTINUOUS, ROUTERS
from fast_tier import only
from real_model import measure_activations, measure_flops, measure_state, recipe

from vqmoe_megatron.plan.activation_memory import activation_bytes, chunk_activation_bytes
from vqmoe_megatron.plan.flops import run_flops
from vqmoe_megatron.plan.layout import check_layout, unsharded
from vqmoe_megatron.plan.parameter_count import count_parameters
from vqmoe_megatron.plan.parameters import chunk_places, stage_parameters
from vqmoe_megatron.plan.state_memory import state_bytes

pytestmark = pytest.mark.distributed
ONE = ["train.global_batch_size=1", "train.micro_batch_size=1"]
LAST_K = "router.min_topk=8"  # the plan's step, which the first one then is
TP2 = {"tensor_model_parallel_size": 2}
LARGEST_ERROR = 0.03


def overrides_of(router: str) -> list[str]:
    last = [LAST_K] if router == "smoe_dropout" else []
    return [*CONTINUOUS, *ROUTERS[router], *last]


@pytest.mark.parametrize("router", only(ROUTERS, "stable_moe"))
def test_tensors_and_state_are_those_of_the_model(router: str, ranks) -> None:  # noqa: ANN001
    sizes = ["parallel.tensor_model_parallel_size=2"]
    overrides = [*overrides_of(router), "model.bf16=true", *sizes]
    overrides += ["optimizer.use_distributed_optimizer=true"]
    measured = ranks(2).run(measure_state, overrides, layout=TP2)
    config = recipe(overrides)
    layout = check_layout(config, 2, "cpu")
    planned = [
        [(p.name, p.shape, p.bytes_per_element) for p in chunk]
        for chunk in stage_parameters(config, layout, 0)
    ]
    for rank in measured:
        assert planned == rank["parameters"]
        kept = state_bytes(config, layout, 0, rank["data"], rank["expert_data"])
        for part in ("weights", "gradients", "main_parameters", "moments", "statistics"):
            assert (part, getattr(kept, part)) == (part, rank[part])


@pytest.mark.parametrize("router", only(ROUTERS, "x_moe"))
def test_operations_are_those_of_the_model(router: str, ranks) -> None:  # noqa: ANN001
    overrides = [*overrides_of(router), *ONE]
    ((forward, backward),) = ranks(1).run(measure_flops, overrides)
    config = recipe(overrides)
    planned = run_flops(config, check_layout(config, 1, "cpu")).all_ranks
    assert (planned.forward, planned.backward) == (forward, backward)


@pytest.mark.full
@pytest.mark.parametrize("router", ROUTERS)
def test_activations_are_near_those_of_the_model(router: str, ranks) -> None:  # noqa: ANN001
    overrides = [*overrides_of(router), "model.seq_length=64", "train.micro_batch_size=2"]
    (measured,) = ranks(1).run(measure_activations, overrides)
    config = recipe(overrides)
    layout = check_layout(config, 1, "cpu")
    (place,) = chunk_places(config.model, layout, 0)
    planned = chunk_activation_bytes(config, place, activation_bytes(config, layout, "cpu"))
    assert planned == pytest.approx(measured, rel=LARGEST_ERROR)


def test_a_token_reads_one_word_of_a_light_router() -> None:
    counted = count_parameters(recipe(overrides_of("stable_moe")), unsharded())
    # 4 layers of 8 experts: centroids 8 * 48 and 8 * 6, words 384 * 6, of which one is read
    assert counted.total_by_part["router"] == 4 * (8 * 48 + 8 * 6 + 384 * 6)
    assert counted.active_by_part["router"] == 4 * (8 * 48 + 8 * 6 + 6)
    assert "router" not in count_parameters(recipe(overrides_of("hash")), unsharded()).total_by_part
