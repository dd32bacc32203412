"""What a code memory sends: rows to the tokens that read them, and the codes of the vocabulary.

W ranks share the rows of a layer, over the axis ``expt_tp_ep``; T local tokens, R rows, H hidden
size, e bytes per element, V vocabulary (padded), K codes; Kc codes of contexts of width d.

    plan, in the form of rows   int64: W counts, and an id for every distinct row that another rank
                                owns; once per microbatch and model chunk, for codes=hidden once per
                                layer, behind an all-gather of codes [T] over TP
    rows                        forward what others ask of this rank, H e each; backward fp32 sums
                                of what this rank asked of others
    table                       all-gather of R / W rows, H e each; reduce-scatter in fp32
    codes, once per step        on the first stage over TP errors and ids of V / TP entries, sums
                                [K, H + 1] and vectors [K, H]; then V ids to the other stages; with
                                contexts also tables [V / TP, d], [V, d] and [Kc, d]
"""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.plan.memory_shape import MemoryShape, RowReads
from vqmoe_megatron.plan.wire import COUNT_BYTES, Term, all_reduced, exact

AXIS = "expt_tp_ep"
ROWS, PLAN, CODES = "code memory rows", "code memory plan", "code memory codes"
FP32_BYTES, ID_BYTES = 4, 8


def microbatch_terms(shape: MemoryShape, reads: RowReads | None = None) -> Iterator[Term]:
    """What a model chunk sends per microbatch for all its layers together; ``reads`` is what was
    counted, None: balanced."""
    if shape.memory.codes != "hidden":
        yield from _plan_terms(shape, reads or shape.balanced_reads)


def layer_terms(shape: MemoryShape, reads: RowReads | None = None) -> Iterator[Term]:
    """What a layer sends per microbatch."""
    reads = reads or shape.balanced_reads
    if shape.memory.codes == "hidden":
        tensor_ranks = shape.layer.tensor_model_parallel_size
        ids = (tensor_ranks - 1) * shape.layer.num_local_tokens * ID_BYTES
        yield Term(PLAN, "all_gather", "tp", ids)
        yield from _plan_terms(shape, reads)
    hidden, element = shape.layer.hidden_size, shape.layer.bytes_per_element
    others = shape.num_ranks - 1
    if not others:
        return
    sum_element = shape.layer.sum_bytes_per_element
    if shape.is_table:
        elements = others * shape.rows_per_rank * hidden
        yield Term(ROWS, "all_gather", AXIS, elements * element)
        yield Term(ROWS, "reduce_scatter", AXIS, elements * sum_element, is_backward=True)
        return
    yield Term(ROWS, "all_to_all", AXIS, exact(reads.num_asked * hidden * element))
    home = exact(reads.num_wanted * hidden * sum_element)
    yield Term(ROWS, "all_to_all", AXIS, home, is_backward=True)


def _plan_terms(shape: MemoryShape, reads: RowReads) -> Iterator[Term]:
    others = shape.num_ranks - 1
    if others and not shape.is_table:
        yield Term(PLAN, "all_to_all", AXIS, others * COUNT_BYTES)
        yield Term(PLAN, "all_to_all", AXIS, exact(reads.num_wanted * ID_BYTES))


def stream_terms(shape: MemoryShape, vocab_size: int, num_stages: int) -> Iterator[Term]:
    """What a rank of the first stage sends once per step until codes are frozen."""
    if not shape.moves:
        return
    memory, ranks = shape.memory, shape.layer.tensor_model_parallel_size
    hidden, width = shape.layer.hidden_size, memory.context_dim
    others_entries = (ranks - 1) * (vocab_size // ranks)
    if shape.groups_entries and memory.codes == "embedding":
        yield Term(CODES, "all_gather", "tp", others_entries * FP32_BYTES)
        for columns in (hidden + 1, hidden):
            num_bytes = memory.num_codes * columns * FP32_BYTES
            yield Term(CODES, "all_reduce", "tp", all_reduced(num_bytes, ranks))
    yield Term(CODES, "all_gather", "tp", others_entries * ID_BYTES)
    used = [vocab_size * ID_BYTES]
    if memory.num_context_codes:
        yield Term(CODES, "all_gather", "tp", others_entries * width * FP32_BYTES)
        used += [rows * width * FP32_BYTES for rows in (vocab_size, memory.num_context_codes)]
    for num_bytes in used:
        yield Term(CODES, "broadcast", "pp", (num_stages - 1) * num_bytes)
