"""What a code memory keeps, by hand; real models are measured in test_activation_memory.py."""

from __future__ import annotations

from real_model import recipe

from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.memory_activations import chunk_bytes, layer_bytes, transient_bytes
from vqmoe_megatron.plan.memory_shape import MemoryShape

EP2 = "parallel.expert_model_parallel_size=2"


def shape_of(*overrides: str, ranks: int = 1) -> MemoryShape:
    codes = ["code_memory.codes=embedding", "code_memory.num_codes=40"]
    config = recipe(["code_memory.num_rows=1024", *codes, *overrides])
    return MemoryShape.from_config(config, check_layout(config, ranks, "cpu"))


def test_rows_are_not_kept_but_their_ids_are() -> None:
    alone, two = shape_of(), shape_of(EP2, ranks=2)
    assert layer_bytes(alone) == layer_bytes(two) == 0
    assert chunk_bytes(alone) == 16 * 3 * 8
    assert chunk_bytes(two) == (16 * 3 + 48) * 8  # and the places of what others ask
    assert transient_bytes(alone) == 2 * 3072 * 48 * 4
    assert transient_bytes(two) == 2 * 48 * 48 * 4


def test_layers_keep_what_is_their_own() -> None:
    assert layer_bytes(shape_of("code_memory.gate=token")) == 16 * (48 + 1) * 4
    made = shape_of("code_memory.values=experts", EP2, ranks=2)
    assert layer_bytes(made) == 1536 * 2 * 64 * 4  # fc1's output and the activation
    hidden = shape_of("code_memory.codes=hidden")
    assert chunk_bytes(hidden) == 0
    assert layer_bytes(hidden) == 16 * (3 + 3) * 8
