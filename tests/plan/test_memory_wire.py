"""What a code memory sends against amounts worked out by hand; real ranks are in tests/simulate."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from real_model import recipe

from vqmoe_megatron.plan.layout import check_layout
from vqmoe_megatron.plan.memory_shape import MemoryShape, RowReads
from vqmoe_megatron.plan.memory_wire import layer_terms, microbatch_terms, stream_terms
from vqmoe_megatron.plan.step_wire import step_wire
from vqmoe_megatron.plan.wire import Term

HIDDEN, VOCAB = 48, 384
EP2 = ["parallel.expert_model_parallel_size=2"]
TP2 = ["parallel.tensor_model_parallel_size=2"]
ROWS = [
    "code_memory.num_rows=1024",
    "code_memory.codes=embedding",
    "code_memory.num_codes=40",
]
STAYING = {
    "frozen": ["code_memory.freeze_after_steps=0"],
    "tokens": ["code_memory.codes=tokens", "code_memory.num_codes=256"],
}


def shape_of(*overrides: str, ranks: int = 2) -> MemoryShape:
    config = recipe([*ROWS, *overrides])
    return MemoryShape.from_config(config, check_layout(config, ranks, "cpu"))


def sent(terms: Iterable[Term]) -> list[tuple[str, str, int, bool]]:
    return [(t.collective, t.axis, t.sent_bytes, t.is_backward) for t in terms if t.sent_bytes]


def test_rows_that_travel() -> None:
    shape, reads = shape_of(*EP2, "model.bf16=true"), RowReads(num_wanted=7, num_asked=11)
    assert not shape.is_table
    assert sent(microbatch_terms(shape, reads)) == [
        ("all_to_all", "expt_tp_ep", 8, False),
        ("all_to_all", "expt_tp_ep", 7 * 8, False),
    ]
    assert sent(layer_terms(shape, reads)) == [
        ("all_to_all", "expt_tp_ep", 11 * HIDDEN * 2, False),
        ("all_to_all", "expt_tp_ep", 7 * HIDDEN * 4, True),
    ]


def test_tables_need_no_plan() -> None:
    shape = shape_of(*EP2, "code_memory.exchange=table", "model.bf16=true")
    assert sent(microbatch_terms(shape)) == []
    assert sent(layer_terms(shape)) == [
        ("all_gather", "expt_tp_ep", 3 * 1024 // 2 * HIDDEN * 2, False),
        ("reduce_scatter", "expt_tp_ep", 3 * 1024 // 2 * HIDDEN * 4, True),
    ]


def test_codes_of_hidden_states_are_planned_in_every_layer() -> None:
    shape = shape_of(*TP2, "parallel.expert_tensor_parallel_size=2", "code_memory.codes=hidden")
    assert sent(microbatch_terms(shape)) == []
    assert sent(layer_terms(shape, RowReads(1, 1)))[:3] == [
        ("all_gather", "tp", 8 * 8, False),  # 16 tokens on two ranks
        ("all_to_all", "expt_tp_ep", 8, False),
        ("all_to_all", "expt_tp_ep", 8, False),
    ]


def test_codes_of_the_vocabulary_are_found_once_per_step() -> None:
    contexts = ["code_memory.num_context_codes=10", "code_memory.context_dim=6"]
    shape = shape_of(*TP2, *contexts)
    half = VOCAB // 2
    assert sent(stream_terms(shape, VOCAB, num_stages=3)) == [
        ("all_gather", "tp", half * 4, False),
        ("all_reduce", "tp", 40 * (HIDDEN + 1) * 4, False),
        ("all_reduce", "tp", 40 * HIDDEN * 4, False),
        ("all_gather", "tp", half * 8, False),
        ("all_gather", "tp", half * 6 * 4, False),
        ("broadcast", "pp", 2 * VOCAB * 8, False),
        ("broadcast", "pp", 2 * VOCAB * 6 * 4, False),
        ("broadcast", "pp", 2 * 10 * 6 * 4, False),
    ]
    random = shape_of(*TP2, "code_memory.codes=random")
    assert sent(stream_terms(random, VOCAB, num_stages=1)) == [
        ("all_gather", "tp", half * 8, False)
    ]


@pytest.mark.parametrize("name", STAYING)
def test_codes_that_stay_send_nothing(name: str) -> None:
    assert sent(stream_terms(shape_of(*TP2, *STAYING[name]), VOCAB, num_stages=3)) == []


def statistics_bytes(*overrides: str) -> list[int]:
    """Of an all-reduce over two replicas, which sends what it reduces; by stage."""
    two = ["parallel.pipeline_model_parallel_size=2", "model.num_layers=2", *overrides]
    config = recipe(two)
    stages = step_wire(config, check_layout(config, 4, "cpu")).stages
    return [
        sum(t.sent_bytes for t in stage.terms if t.part == "codebook statistics")
        for stage in stages
    ]


def test_reads_by_row_are_reduced_with_the_statistics_also_once_codes_are_frozen() -> None:
    plain, of_rows = statistics_bytes(), (3 * 1024 + 2) * 4
    for overrides in STAYING.values():
        assert statistics_bytes(*ROWS, *overrides) == [plain[0] + of_rows, plain[1]]
    assert statistics_bytes(*ROWS) == [plain[0] + of_rows + VOCAB * 4, plain[1]]


def test_the_plan_says_that_its_rows_are_the_most() -> None:
    config = recipe([*ROWS, *EP2])
    said = " ".join(step_wire(config, check_layout(config, 2, "cpu")).assumptions)
    assert "which is the most" in said
    assert "code_memory.freeze_after_steps=200" in said
