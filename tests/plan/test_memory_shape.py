"""Sizes of a code memory on a rank, and the form in which its rows travel."""

from __future__ import annotations

import pytest
from real_model import recipe

from vqmoe_megatron.plan.layout import ParallelLayout, check_layout
from vqmoe_megatron.plan.memory_shape import MemoryShape, carries_memory, num_memory_layers
from vqmoe_megatron.plan.parameters import chunk_places

EP2 = "parallel.expert_model_parallel_size=2"


def shape_of(*overrides: str, ranks: int = 2) -> MemoryShape:
    config = recipe(overrides)
    return MemoryShape.from_config(config, check_layout(config, ranks, "cpu"))


def test_rows_are_shared_by_the_experts_ranks() -> None:
    shape = shape_of("code_memory.num_rows=1024", EP2)
    assert (shape.num_ranks, shape.rows_per_rank, shape.num_reads) == (2, 3 * 512, 16 * 3)
    assert shape.expected_distinct == pytest.approx(47.6, abs=0.1)
    assert shape.rows_per_owner == 24
    assert (shape.balanced_reads.num_wanted, shape.balanced_reads.num_asked) == (24, 24)
    assert shape.num_fetched == 48


@pytest.mark.parametrize(
    ("overrides", "is_table", "num_fetched", "words"),
    [
        (["code_memory.num_rows=1024"], False, 48, "rows: those read travel (3,072 rows, at most"),
        (
            [
                "code_memory.num_rows=8",
                "code_memory.max_order=1",
                "train.global_batch_size=16",
                "train.micro_batch_size=8",
            ],
            True,
            8,
            "table: all rows are gathered (8 rows, at most 8 of them read by a rank's microbatch, "
            "of text about 7: 8 <= 1.25 x 7)",
        ),
        (
            ["code_memory.num_rows=1024", "code_memory.exchange=table"],
            True,
            3072,
            "table: all rows are gathered (code_memory.exchange=table;",
        ),
    ],
)
def test_the_form_is_said_with_its_reason(
    overrides: list[str], is_table: bool, num_fetched: int, words: str
) -> None:
    shape = shape_of(*overrides, EP2)
    assert (shape.is_table, shape.num_fetched) == (is_table, num_fetched)
    assert shape.form_in_words.startswith(words)


def test_one_rank_sends_nothing() -> None:
    shape = shape_of("code_memory.num_rows=8", ranks=1)
    assert not shape.is_table
    assert shape.form_in_words == "on the rank itself"
    assert shape.num_fetched == 24


def test_layers_that_carry_memory() -> None:
    config = recipe(
        ["code_memory.num_rows=8", "code_memory.layers=[1, 2, 3]", "model.moe_layer_freq=2"]
    )
    assert [carries_memory(config, n) for n in range(4)] == [True, False, True, False]
    layout = ParallelLayout.from_config(config, 1)
    assert num_memory_layers(config, chunk_places(config.model, layout, 0)) == 2
