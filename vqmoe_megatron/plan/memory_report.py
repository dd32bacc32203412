"""A code memory's figures of one layer on one rank, as plain values for tables and JSON."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory_shape import MemoryShape
from vqmoe_megatron.plan.memory_wire import layer_terms, microbatch_terms, stream_terms
from vqmoe_megatron.plan.parameters import padded_vocab_size
from vqmoe_megatron.plan.wire import Term, summed


def code_memory_json(config: RunConfig, layout: ParallelLayout) -> dict[str, Any]:
    """Rows, bytes and the form of exchange; distinct rows are the most there can be in the mean.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    shape = MemoryShape.from_config(config, layout)
    stages = layout.pipeline_model_parallel_size
    elements = shape.rows_per_rank * shape.layer.hidden_size
    return {
        "what": shape.memory.in_words,
        "rows_per_layer": shape.memory.rows_per_layer,
        "rows_per_rank": shape.rows_per_rank,
        "row_bytes_per_rank": elements * shape.layer.bytes_per_element,
        "num_reads": shape.num_reads,
        "expected_distinct_rows": shape.expected_distinct,
        "is_table": shape.is_table,
        "form": shape.form_in_words,
        "plan_bytes_by_axis": _by_axis(microbatch_terms(shape)),
        "layer_bytes_by_axis": _by_axis(layer_terms(shape)),
        "codes_bytes_by_axis": _by_axis(
            stream_terms(shape, padded_vocab_size(config.model), stages)
        ),
    }


def _by_axis(terms: Iterable[Term]) -> dict[str, float]:
    """Bytes by axis, forward and backward; axes that carry nothing are left out."""
    found = summed(terms, lambda term: term.axis)
    return {axis: float(sent) for axis, (_, sent) in found.items() if sent}
