"""Bytes that one rank sends to other ranks for one VQMoE layer: collective by collective.

T local tokens, P expert-parallel ranks, E expert-tensor ranks, H hidden size, b bytes per element,
N experts, C codes per token, S slots per rank in code space, w columns that go back to a token.

    all-to-all of blocks       what leaves for other ranks
    all-gather of n bytes      (P - 1) n
    reduce-scatter to n bytes  (P - 1) n
    all-reduce of n bytes      2 (P - 1) / P n

One term per collective that the layer calls; a group of one rank has none:
  1. token dispatch and combine     rows that travel: ``_dispatch_terms``
  2. the table of code outputs      execution=code_space: ``_table_terms``
  3. the gradient to the tokens     straight_through=group: ``_group_mean_terms``; in code space
                                    also for token: ``_row_gradient_terms``

Not counted: a forward pass repeated by recompute, what Megatron's router reduces for its balance
loss, and the codebook statistics, which are reduced once per step for all layers together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from vqmoe_megatron.plan.exact import Exact, exact
from vqmoe_megatron.plan.layer_shape import LayerShape

COUNT_BYTES = 8  # row counts are int64


@dataclass(frozen=True)
class RowTraffic:
    """How many rows one rank moves, counted or expected; a :class:`Fraction` where an expectation
    is no whole number."""

    num_rows_sent: Exact  # of this rank, to other expert-parallel ranks
    num_rows_received: Exact  # by this rank, from other expert-parallel ranks
    largest_gathered_rows: Exact  # most rows that a rank of the expert-tensor group has, its own
    # included; the others are padded to it

    @classmethod
    def balanced(cls, num_rows: int, expert_model_parallel_size: int) -> RowTraffic:
        """Return what ``num_rows`` rows on every rank cause when experts are equally loaded."""
        ranks = expert_model_parallel_size
        away = exact(Fraction(num_rows * (ranks - 1), ranks))
        return cls(away, away, num_rows)


@dataclass(frozen=True)
class WireTerm:
    """One collective of one layer: what one rank sends in one microbatch."""

    part: str  # counts | rows | table | straight_through
    is_backward: bool
    collective: str  # all_to_all | all_gather | reduce_scatter | all_reduce
    group: str  # ep | expt_tp | tp
    sent_bytes: Exact
    is_once_per_step: bool = False  # else once per microbatch


@dataclass(frozen=True)
class WireCost:
    """All collectives of a layer. ``forward_bytes`` and ``backward_bytes`` are those of a
    microbatch in which everything happens, once per step or not."""

    terms: tuple[WireTerm, ...]

    @property
    def forward_bytes(self) -> Exact:
        """Sent in the forward pass of a microbatch."""
        return exact(sum(Fraction(t.sent_bytes) for t in self.terms if not t.is_backward))

    @property
    def backward_bytes(self) -> Exact:
        """Sent in the backward pass of a microbatch."""
        return exact(sum(Fraction(t.sent_bytes) for t in self.terms if t.is_backward))

    @property
    def microbatch_bytes(self) -> Exact:
        """Sent in both passes of a microbatch."""
        return exact(self.forward_bytes + self.backward_bytes)

    def step_bytes(self, num_microbatches: int) -> Exact:
        """Sent in an optimizer step of so many microbatches."""
        times = {True: 1, False: num_microbatches}
        return exact(sum(Fraction(t.sent_bytes) * times[t.is_once_per_step] for t in self.terms))


def wire_cost(
    layer: LayerShape,
    traffic: RowTraffic | None = None,
    straight_through_traffic: RowTraffic | None = None,
) -> WireCost:
    """Return every collective of the layer on one rank.

    Args:
        layer: its sizes and settings.
        traffic: of the rows that travel in the forward pass (both paths' when executed by tokens,
            the continuous path's in code space); None: balanced.
        straight_through_traffic: of the T C gradient rows that travel in code space's backward pass
            with straight_through=token; None: balanced. (For group one row per slot travels, from
            every rank to every other, whatever the tokens are.)

    Amounts are ints wherever they are whole numbers, else :class:`Fraction`: a balanced load that
    does not divide, or an all-reduce, whose convention has the factor (E - 1) / E.
    """
    num_ranks = layer.expert_model_parallel_size
    traffic = traffic or RowTraffic.balanced(layer.num_dispatched_rows, num_ranks)
    back = straight_through_traffic or RowTraffic.balanced(layer.num_discrete_rows, num_ranks)
    if layer.straight_through == "group":
        back = RowTraffic.balanced(num_ranks * layer.num_slots, num_ranks)
    terms: list[WireTerm] = []
    if layer.execution == "tokens" or layer.path == "dual":
        terms += _dispatch_terms(layer, traffic)
    if layer.execution == "code_space":
        terms += _table_terms(layer)
    if layer.straight_through == "group" and layer.has_code_inputs:
        terms += _group_mean_terms(layer)
    if layer.straight_through in ("token", "group") and layer.execution == "code_space":
        terms += _row_gradient_terms(layer, back)
    return WireCost(tuple(terms))


def _dispatch_terms(layer: LayerShape, traffic: RowTraffic) -> Iterator[WireTerm]:
    """Rows out and results back; in the backward pass the gradients the same ways."""
    row_bytes = layer.hidden_size * layer.bytes_per_element
    yield from _counts(layer, layer.num_moe_experts, "counts", False)
    yield from _rows_out(layer, traffic, row_bytes, "rows", False)
    yield from _rows_back(layer, traffic, row_bytes, "rows", False)
    yield from _rows_out(layer, traffic, row_bytes, "rows", True)
    if layer.dispatched_rows_need_gradient:
        yield from _rows_back(layer, traffic, row_bytes, "rows", True)


def _table_terms(layer: LayerShape) -> Iterator[WireTerm]:
    """[S, H] of every rank to all ranks; in the backward pass the sums per code to their owner."""
    others, shards = layer.expert_model_parallel_size - 1, layer.expert_tensor_parallel_size
    num_elements = layer.num_slots * layer.hidden_size  # of one rank's slots
    own_bytes = num_elements * layer.bytes_per_element
    sum_bytes = num_elements * layer.sum_bytes_per_element
    once = layer.table_per_step
    if shards > 1:
        summed = _all_reduced(own_bytes, shards)
        yield WireTerm("table", False, "all_reduce", "expt_tp", summed, once)
    if others:
        yield WireTerm("table", False, "all_gather", "ep", others * own_bytes, once)
        yield WireTerm("table", True, "reduce_scatter", "ep", others * sum_bytes, once)
    if shards > 1:
        yield WireTerm("table", True, "all_reduce", "expt_tp", summed, once)


def _group_mean_terms(layer: LayerShape) -> Iterator[WireTerm]:
    """Under sequence parallelism the tensor ranks add up their sums per code and, as one more
    column, their tokens per code: in code space all slots at once, else slice by slice."""
    ranks, num_slices = layer.tensor_model_parallel_size, layer.num_code_slices
    num_sums, num_rows = num_slices, layer.num_codes
    if layer.execution == "code_space":
        num_sums, num_rows = 1, layer.expert_model_parallel_size * layer.num_slots
    if ranks > 1:
        sum_bytes = num_rows * (layer.hidden_size + 1) * layer.sum_bytes_per_element
        for _ in range(num_sums):
            summed = _all_reduced(sum_bytes, ranks)
            yield WireTerm("straight_through", True, "all_reduce", "tp", summed)


def _row_gradient_terms(layer: LayerShape, traffic: RowTraffic) -> Iterator[WireTerm]:
    """Gradient rows to the owners of their codes, counted per slot; w columns of each back."""
    part = "straight_through"
    out_bytes = layer.hidden_size * layer.bytes_per_element
    back_bytes = layer.straight_through_width * layer.straight_through_bytes_per_element
    num_table_rows = layer.expert_model_parallel_size * layer.num_slots
    yield from _counts(layer, num_table_rows, part, True)
    yield from _rows_out(layer, traffic, out_bytes, part, True)
    yield from _rows_back(layer, traffic, back_bytes, part, True)


def _counts(layer: LayerShape, num_slots: int, part: str, is_backward: bool) -> Iterator[WireTerm]:
    """int64 [P, num_slots / P]: each rank tells each other one its counts, shards share theirs."""
    ranks, shards = layer.expert_model_parallel_size, layer.expert_tensor_parallel_size
    if ranks > 1:
        sent_bytes = (ranks - 1) * (num_slots // ranks) * COUNT_BYTES
        yield WireTerm(part, is_backward, "all_to_all", "ep", sent_bytes)
    if shards > 1:
        sent_bytes = (shards - 1) * num_slots * COUNT_BYTES
        yield WireTerm(part, is_backward, "all_gather", "expt_tp", sent_bytes)


def _rows_out(
    layer: LayerShape, traffic: RowTraffic, row_bytes: int, part: str, is_backward: bool
) -> Iterator[WireTerm]:
    """From a token's rank to its expert's shards: all-to-all, then padded all-gather."""
    if layer.expert_model_parallel_size > 1:
        sent_bytes = exact(traffic.num_rows_sent * row_bytes)
        yield WireTerm(part, is_backward, "all_to_all", "ep", sent_bytes)
    if (others := layer.expert_tensor_parallel_size - 1) > 0:
        sent_bytes = exact(others * traffic.largest_gathered_rows * row_bytes)
        yield WireTerm(part, is_backward, "all_gather", "expt_tp", sent_bytes)


def _rows_back(
    layer: LayerShape, traffic: RowTraffic, row_bytes: int, part: str, is_backward: bool
) -> Iterator[WireTerm]:
    """From an expert's shards to the token's rank: padded reduce-scatter, then all-to-all."""
    if (others := layer.expert_tensor_parallel_size - 1) > 0:
        sent_bytes = exact(others * traffic.largest_gathered_rows * row_bytes)
        yield WireTerm(part, is_backward, "reduce_scatter", "expt_tp", sent_bytes)
    if layer.expert_model_parallel_size > 1:
        sent_bytes = exact(traffic.num_rows_received * row_bytes)
        yield WireTerm(part, is_backward, "all_to_all", "ep", sent_bytes)


def _all_reduced(num_bytes: int, num_ranks: int) -> Exact:
    return exact(Fraction(2 * (num_ranks - 1) * num_bytes, num_ranks))
