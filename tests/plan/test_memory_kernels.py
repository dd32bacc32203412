"""Kernels of a code memory; their operations are compared with all others in test_step_kernels."""

from __future__ import annotations

from real_model import recipe

from vqmoe_megatron.plan.kernels import STEP
from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.memory_kernels import memory_kernels, stream_kernels
from vqmoe_megatron.plan.memory_shape import MemoryShape
from vqmoe_megatron.plan.parameters import ChunkPlace

MEMORY = [
    "code_memory.num_rows=1024",
    "code_memory.codes=embedding",
    "code_memory.num_codes=40",
]
FIRST, OTHER = (ChunkPlace(range(0), is_first, False) for is_first in (True, False))


def shape_of(*overrides: str, ranks: int = 1) -> MemoryShape:
    config = recipe([*MEMORY, *overrides])
    return MemoryShape.from_config(config, check_layout(config, ranks, "cpu"))


def names(*overrides: str, ranks: int = 1, place: ChunkPlace = FIRST) -> set[str]:
    shape = shape_of(*overrides, ranks=ranks)
    return {kernel.name for kernel in stream_kernels(shape, 384, place)}


def test_reads_are_gathered_once_per_address() -> None:
    (kernel,) = (k for k in memory_kernels(shape_of(), "cpu") if k.name == "sums of rows")
    reads, output = 16 * 3, 16 * 48 * 4
    assert kernel.read_bytes == reads * (48 * 4 + 8) + 2 * output
    assert kernel.operations == 0


def test_the_vocabulary_is_searched_on_the_first_chunk_until_the_freeze() -> None:
    assert "search of the vocabulary" in names()
    assert names(place=OTHER) == {"addresses"}
    frozen = {"addresses", "reads by row", "rows in use"}
    assert names("code_memory.freeze_after_steps=0") == frozen
    (search,) = (
        k for k in stream_kernels(shape_of(), 384, FIRST) if k.name == "search of the vocabulary"
    )
    assert (search.phase, search.operations) == (STEP, 2 * 384 * 40 * 48)


def test_reads_are_counted_by_the_first_chunk_or_by_layers_with_codes_of_their_own() -> None:
    kernels = {kernel.name: kernel for kernel in stream_kernels(shape_of(), 384, FIRST)}
    assert kernels["reads by row"].read_bytes == 16 * 3 * (8 + 2 * 4)
    assert kernels["rows in use"].phase == STEP
    assert kernels["rows in use"].written_bytes == 3 * 3 * 1024 * 4
    of_layer = {kernel.name for kernel in memory_kernels(shape_of(), "cpu")}
    assert "reads by row" not in of_layer
    hidden = memory_kernels(shape_of("code_memory.codes=hidden"), "cpu")
    assert {"reads by row", "rows in use"} <= {kernel.name for kernel in hidden}


def test_distinct_rows_are_sorted_where_they_travel() -> None:
    two = "parallel.expert_model_parallel_size=2"
    assert "distinct rows" in names(two, ranks=2)
    assert "distinct rows" not in names(two, "code_memory.exchange=table", ranks=2)
    assert names("code_memory.codes=hidden") == set()
