"""Transformer-XL's attention counted, against a real model."""

from __future__ import annotations

import pytest
from real_model import (
    measure_activations,
    measure_flops,
    measure_peak,
    measure_state,
    recipe,
)

from vqmoe_megatron.checkpoint.room import planned_bytes
from vqmoe_megatron.plan.activation_memory import activation_bytes, chunk_activation_bytes
from vqmoe_megatron.plan.flops import run_flops
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.memory import stage_memory
from vqmoe_megatron.plan.parameters import chunk_places, stage_parameters
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.plan.state_memory import state_bytes

RELATIVE = ["model.attention=transformer_xl", "model.position_embedding_type=relative"]
# One microbatch, so that a second pass reads what the first one left, and a full memory.
MEMORY = [*RELATIVE, "model.memory_length_tokens=12", "train.global_batch_size=1"]
GROUPS = [*MEMORY, "model.num_query_groups=2", "model.num_layers=2"]
CASES = {"without": RELATIVE, "memory": MEMORY, "memory, groups": GROUPS}
named = pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, 2])
def test_parameters_are_those_of_the_model(size: int, ranks) -> None:  # noqa: ANN001
    layout = {"tensor_model_parallel_size": size}
    overrides = [*RELATIVE, f"parallel.tensor_model_parallel_size={size}"]
    found = ranks(size).run(measure_state, overrides, layout=layout)[0]["parameters"]
    config = recipe(overrides)
    wanted = stage_parameters(config, check_layout(config, size, "cpu"), 0)
    assert found == [[(p.name, p.shape, p.bytes_per_element) for p in chunk] for chunk in wanted]


@pytest.mark.distributed
@named
def test_operations_are_those_that_torch_counts(overrides: list[str], ranks) -> None:  # noqa: ANN001
    every = [*overrides, "train.global_batch_size=1", "vq.path=continuous"]
    (found,) = ranks(1).run(measure_flops, every)
    config = recipe(every)
    wanted = run_flops(config, check_layout(config, 1, "cpu")).all_ranks
    assert found == [wanted.forward, wanted.backward]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "overrides",
    [
        *CASES.values(),
        [*MEMORY, "model.bf16=true", "model.attention_dropout=0.1", "model.hidden_dropout=0.1"],
    ],
    ids=[*CASES, "memory, bf16, dropout"],
)
def test_activations_are_those_that_are_saved(overrides: list[str], ranks) -> None:  # noqa: ANN001
    every = [
        *overrides, "model.seq_length=64", "train.micro_batch_size=2", "model.hidden_size=64",
        "train.global_batch_size=2", "model.moe_ffn_hidden_size=128",
    ]  # fmt: skip
    (found,) = ranks(1).run(measure_activations, every)
    config = recipe(every)
    layout = check_layout(config, 1, "cpu")
    (place,) = chunk_places(config.model, layout, 0)
    planned = chunk_activation_bytes(config, place, activation_bytes(config, layout, "cpu"))
    assert planned == pytest.approx(found, rel=0.03)


@pytest.mark.distributed
def test_the_peak_of_a_step(ranks) -> None:  # noqa: ANN001
    """Long segments, few layers: scores within a pass are most of it."""
    every = [
        *MEMORY, "model.num_layers=1", "model.seq_length=128", "model.memory_length_tokens=128",
        "vq.path=continuous",
    ]  # fmt: skip
    (found,) = ranks(1).run(measure_peak, every)
    config = recipe(every)
    planned = stage_memory(config, check_layout(config, 1, "cpu"), 0, "cpu")
    # The new memory stands beside the old one, which the plan counts with the state.
    assert planned.step_peak - planned.state.total == pytest.approx(found, rel=0.25)


def test_the_memory_is_kept_for_every_microbatch_and_layer() -> None:
    config = recipe([*RELATIVE, "model.memory_length_tokens=12", "model.num_layers=2"])
    layout = check_layout(config, 1, "cpu")
    without = recipe([*RELATIVE, "model.num_layers=2"])
    assert state_bytes(config, layout, 0).segment_memory == 8 * 2 * 12 * 48 * 4  # of 8 rows
    assert planned_bytes(config) - planned_bytes(without) == 8 * 2 * 12 * 48 * 4
    assert "segment_memory" in plan_run(config, 1, "CPU").figures.memory[0].by_part()


def test_what_tensor_ranks_gather_is_not_planned() -> None:
    tp2 = ["parallel.tensor_model_parallel_size=2"]
    (error,) = plan_run(recipe([*MEMORY, *tp2]), 2, "CPU").errors
    assert "memory_length_tokens = 12 with TP = 2 > 1: vqmoe plan does not count" in error
    assert plan_run(recipe([*RELATIVE, *tp2]), 2, "CPU").errors == ()
