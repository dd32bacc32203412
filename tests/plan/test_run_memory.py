"""The estimated peak of a step against the storages that a real step makes and holds."""

from __future__ import annotations

import pytest
from real_model import measure_peak, recipe

from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.run_memory import stage_memory

LARGEST_ERROR = 0.12
SMALL_BATCH = ["train.global_batch_size=8", "train.micro_batch_size=8", "model.seq_length=64"]
CASES = {
    "large vocabulary, fp32": ["model.vocab_size=32000"],
    "large vocabulary, bf16": ["model.vocab_size=32000", "model.bf16=true"],
    "small vocabulary": ["model.vocab_size=300"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_peak_is_near_what_a_step_holds(ranks, name: str) -> None:
    overrides = SMALL_BATCH + CASES[name]
    (measured,) = ranks(1).run(measure_peak, overrides)
    config = recipe(overrides)
    planned = stage_memory(config, check_layout(config, 1, "cpu"), 0, "local")
    beside_state = planned.peak - planned.state.total
    assert abs(beside_state / measured - 1) < LARGEST_ERROR, (beside_state, measured)
