"""An arm's shape for the cost model says what the arm's own settings say."""

from __future__ import annotations

import pytest

from vqmoe_megatron.bench.arm_table import ARMS
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.plan_shape import layer_shape

CASE = LayerCase(8, 32, 100, 64, 96, dtype="bfloat16", norm="separate")


@pytest.mark.parametrize("letter", [a for a, spec in ARMS.items() if spec.kind == "vqmoe"])
def test_settings_are_carried_over(letter: str) -> None:
    spec = ARMS[letter]
    shape = layer_shape(CASE, spec, {"expert_model_parallel_size": 4})
    for name, value in spec.vq.items():
        assert getattr(shape.vq, name) == value, name
    assert shape.bytes_per_element == 2
    assert shape.vq.num_codes == CASE.num_codes
    assert shape.num_local_tokens == 100
    assert shape.expert_model_parallel_size == 4
    assert shape.vq.norm == "separate"
    assert shape.num_microbatches == spec.num_microbatches
