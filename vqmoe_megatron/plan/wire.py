"""What a rank sends to other ranks: terms, their sums, and those of one VQMoE layer.

A term names the axis that its collective runs along: the process groups by the parallel sizes they
span. Context parallelism is not counted (``uncounted``), so it is left out of the names:

    tp       tensor-parallel ranks           pp             pipeline stages
    ep       expert-parallel ranks           expt_tp        expert-tensor ranks
    dp       replicas of the dense layers    expt_dp        replicas of the experts
    tp_dp    replicas of a codebook          world          all ranks
    tp_pp    one copy of the dense layers    expt_tp_ep_pp  one copy of the experts
    expt_tp_ep  one copy of a layer's experts, whose ranks share the rows of a code memory
    embedding  first and last stage of a pipeline, with tied embeddings

Bytes of a term, P ranks of a group; a group of one rank sends nothing:

    all-to-all of blocks       what leaves for other ranks
    all-gather of n bytes      (P - 1) n
    reduce-scatter to n bytes  (P - 1) n
    all-reduce of n bytes      2 (P - 1) / P n
    broadcast of n bytes       (P - 1) n from its source, nothing from the others
    send of n bytes            n

A layer of T local tokens, P expert-parallel ranks, E expert-tensor ranks, H hidden size, b bytes
per element, N experts, C codes per token, S slots per rank in code space, w columns that go back to
a token calls, a term each:
  1. token dispatch and combine     rows that travel: ``_dispatch_terms``
  2. the table of code outputs      execution=code_space, path=filled: ``_table_terms``
  3. the gradient to the tokens     straight_through=group: ``_group_mean_terms``; in code space
                                    also for token: ``_row_gradient_terms``
  4. the shared expert's tokens     over tensor ranks: ``_shared_expert_terms``
Not among them: a forward pass repeated by recompute, what Megatron's router reduces for its balance
loss, and the codebook statistics, which are reduced once per step for all layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import TypeVar

from vqmoe_megatron.plan.shape import LayerShape

Exact = int | Fraction  # an int where it is a whole number; never a rounded float
Key = TypeVar("Key", bound=Hashable)
AXES = (
    *("tp", "ep", "expt_tp", "pp", "dp", "expt_dp", "tp_dp"),
    *("expt_tp_ep", "embedding", "tp_pp", "expt_tp_ep_pp", "world"),
)
COUNT_BYTES = 8  # row counts and tokens per expert are int64


def exact(value: Exact) -> Exact:
    """Return ``value`` as an int when it is a whole number, else as the :class:`Fraction` it is."""
    return value.numerator if value.denominator == 1 else Fraction(value)


@dataclass(frozen=True)
class Term:
    """One collective of one layer, or those of one kind, for one purpose, of a whole step: what one
    rank sends."""

    part: str  # attention | dense_mlp | moe ... | embedding | output | pipeline | gradients | ...
    collective: str  # all_to_all | all_gather | reduce_scatter | all_reduce | broadcast | send
    axis: str  # one of AXES
    sent_bytes: Exact  # of all calls together
    num_calls: int = 1
    is_backward: bool = False
    is_once_per_step: bool = False  # of a layer; else once per microbatch


TermOf = Callable[[str, str, Exact], Term]


def summed(
    terms: Iterable[Term], key: Callable[[Term], Key], num_microbatches: int = 1
) -> dict[Key, tuple[int, Exact]]:
    """Calls and bytes of terms with the same key, in the order in which keys first appear."""
    found: dict[Key, tuple[int, Exact]] = {}
    for term in terms:
        times = 1 if term.is_once_per_step else num_microbatches
        calls, sent = found.get(key(term), (0, 0))
        found[key(term)] = calls + times * term.num_calls, sent + times * term.sent_bytes
    return {kind: (calls, exact(sent)) for kind, (calls, sent) in found.items()}


def total_bytes(terms: Iterable[Term], num_microbatches: int = 1) -> Exact:
    """Sent by all terms in a step of so many microbatches."""
    return summed(terms, lambda term: None, num_microbatches).get(None, (0, 0))[1]


def all_reduced(num_bytes: int, num_ranks: int) -> Exact:
    """2 (P - 1) / P n."""
    return others_share(2 * num_bytes, num_ranks)


def others_share(number: int, num_ranks: int) -> Exact:
    """(P - 1) / P of what is spread evenly over P ranks."""
    return exact(Fraction((num_ranks - 1) * number, num_ranks))


@dataclass(frozen=True)
class StageWire:
    """A step of one rank of one pipeline stage; with balanced loads all its ranks send the same."""

    pipeline_rank: int
    terms: tuple[Term, ...]

    @property
    def sent_bytes(self) -> Exact:
        """Of the whole step."""
        return total_bytes(self.terms)

    @property
    def by_axis(self) -> dict[str, Exact]:
        """Bytes by axis; axes that carry nothing are left out."""
        found = summed(self.terms, lambda term: term.axis)
        return {axis: found[axis][1] for axis in AXES if axis in found}

    @property
    def by_collective(self) -> dict[tuple[str, str], tuple[int, Exact]]:
        """Calls and bytes by (collective, axis): what a counter sees."""
        return dict(sorted(summed(self.terms, lambda t: (t.collective, t.axis)).items()))


@dataclass(frozen=True)
class StepWire:
    """One optimizer step of a run, stage by stage."""

    stages: tuple[StageWire, ...]
    assumptions: tuple[str, ...]  # sentences: what the bytes rest on

    @property
    def sent_bytes(self) -> Exact:
        """Of a rank of the stage that sends most."""
        return max(stage.sent_bytes for stage in self.stages)

    @property
    def by_axis(self) -> dict[str, Exact]:
        """Bytes by axis, each of the stage that sends most along it."""
        of_stages = [stage.by_axis for stage in self.stages]
        return {
            axis: max(of.get(axis, 0) for of in of_stages)
            for axis in AXES
            if any(axis in of for of in of_stages)
        }


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
        away = others_share(num_rows, expert_model_parallel_size)
        return cls(away, away, num_rows)


def layer_terms(
    layer: LayerShape,
    traffic: RowTraffic | None = None,
    straight_through_traffic: RowTraffic | None = None,
) -> tuple[Term, ...]:
    """Return every collective of the layer on one rank, in a microbatch in which everything
    happens, once per step or not. Parts: counts, rows, table, straight_through,
    shared_expert.

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
    if layer.vq.straight_through == "group":
        back = RowTraffic.balanced(num_ranks * layer.num_slots, num_ranks)
    terms: list[Term] = []
    if not layer.vq.in_code_space or layer.vq.path == "dual":
        terms += _dispatch_terms(layer, traffic)
    if layer.vq.in_code_space or layer.vq.has_fill_table:
        terms += _table_terms(layer)
    if layer.vq.straight_through == "group" and layer.has_code_inputs:
        terms += _group_mean_terms(layer)
    if layer.vq.straight_through in ("token", "group") and layer.vq.in_code_space:
        terms += _row_gradient_terms(layer, back)
    terms += _shared_expert_terms(layer)
    return tuple(terms)


def _shared_expert_terms(layer: LayerShape) -> Iterator[Term]:
    """Column- and row-parallel under sequence parallelism: the second backward gather is of fc1's
    input, for its weight's gradient."""
    if not layer.shared_expert_width or layer.tensor_model_parallel_size == 1:
        return
    block = layer.num_local_tokens * layer.hidden_size * layer.bytes_per_element
    moved = (layer.tensor_model_parallel_size - 1) * block
    for is_backward, collective in (
        (False, "all_gather"), (False, "reduce_scatter"),
        (True, "all_gather"), (True, "all_gather"), (True, "reduce_scatter"),
    ):  # fmt: skip
        yield Term("shared_expert", collective, "tp", moved, is_backward=is_backward)


def _term_of(part: str, is_backward: bool = False, is_once_per_step: bool = False) -> TermOf:
    """Terms of one part and pass, by collective, axis and sent bytes."""
    return partial(Term, part, is_backward=is_backward, is_once_per_step=is_once_per_step)


def _dispatch_terms(layer: LayerShape, traffic: RowTraffic) -> Iterator[Term]:
    """Rows out and results back; in the backward pass the gradients the same ways."""
    row_bytes = layer.hidden_size * layer.bytes_per_element
    forward, backward = _term_of("rows"), _term_of("rows", is_backward=True)
    yield from _counts(layer, layer.num_moe_experts, _term_of("counts"))
    yield from _rows_out(layer, traffic, row_bytes, forward)
    yield from _rows_back(layer, traffic, row_bytes, forward)
    yield from _rows_out(layer, traffic, row_bytes, backward)
    if layer.dispatched_rows_need_gradient:
        yield from _rows_back(layer, traffic, row_bytes, backward)


def _table_terms(layer: LayerShape) -> Iterator[Term]:
    """[S, H] of every rank to all ranks; in the backward pass the sums per code to their owner."""
    others, shards = layer.expert_model_parallel_size - 1, layer.expert_tensor_parallel_size
    num_elements = layer.num_slots * layer.hidden_size  # of one rank's slots
    own_bytes = num_elements * layer.bytes_per_element
    sum_bytes = num_elements * layer.sum_bytes_per_element

    once = layer.vq.table_per_step
    forward, backward = _term_of("table", False, once), _term_of("table", True, once)
    if shards > 1:
        yield forward("all_reduce", "expt_tp", all_reduced(own_bytes, shards))
    if others:
        yield forward("all_gather", "ep", others * own_bytes)
    if not layer.has_table_gradient:
        return
    if others:
        yield backward("reduce_scatter", "ep", others * sum_bytes)
    if shards > 1:
        yield backward("all_reduce", "expt_tp", all_reduced(own_bytes, shards))


def _group_mean_terms(layer: LayerShape) -> Iterator[Term]:
    """Under sequence parallelism the tensor ranks add up their sums per code and, as one more
    column, their tokens per code: in code space all slots at once, else slice by slice."""
    ranks = layer.tensor_model_parallel_size
    num_sums, num_rows = layer.vq.num_code_slices, layer.vq.num_codes
    if layer.vq.in_code_space:
        num_sums, num_rows = 1, layer.expert_model_parallel_size * layer.num_slots
    if ranks > 1:
        sum_bytes = num_rows * (layer.hidden_size + 1) * layer.sum_bytes_per_element
        summed_bytes = all_reduced(sum_bytes, ranks)
        for _ in range(num_sums):
            yield Term("straight_through", "all_reduce", "tp", summed_bytes, is_backward=True)


def _row_gradient_terms(layer: LayerShape, traffic: RowTraffic) -> Iterator[Term]:
    """Gradient rows to the owners of their codes, counted per slot; w columns of each back."""
    term = _term_of("straight_through", is_backward=True)
    out_bytes = layer.hidden_size * layer.bytes_per_element
    back_bytes = layer.straight_through_width * layer.straight_through_bytes_per_element
    num_table_rows = layer.expert_model_parallel_size * layer.num_slots
    yield from _counts(layer, num_table_rows, term)
    yield from _rows_out(layer, traffic, out_bytes, term)
    yield from _rows_back(layer, traffic, back_bytes, term)


def _counts(layer: LayerShape, num_slots: int, term: TermOf) -> Iterator[Term]:
    """int64 [P, num_slots / P]: each rank tells each other one its counts, shards share theirs."""
    ranks, shards = layer.expert_model_parallel_size, layer.expert_tensor_parallel_size
    if ranks > 1:
        sent_bytes = (ranks - 1) * (num_slots // ranks) * COUNT_BYTES
        yield term("all_to_all", "ep", sent_bytes)
    if shards > 1:
        sent_bytes = (shards - 1) * num_slots * COUNT_BYTES
        yield term("all_gather", "expt_tp", sent_bytes)


def _rows_out(
    layer: LayerShape, traffic: RowTraffic, row_bytes: int, term: TermOf
) -> Iterator[Term]:
    """From a token's rank to its expert's shards: all-to-all, then padded all-gather."""
    if layer.expert_model_parallel_size > 1:
        sent_bytes = exact(traffic.num_rows_sent * row_bytes)
        yield term("all_to_all", "ep", sent_bytes)
    if (others := layer.expert_tensor_parallel_size - 1) > 0:
        sent_bytes = exact(others * traffic.largest_gathered_rows * row_bytes)
        yield term("all_gather", "expt_tp", sent_bytes)


def _rows_back(
    layer: LayerShape, traffic: RowTraffic, row_bytes: int, term: TermOf
) -> Iterator[Term]:
    """From an expert's shards to the token's rank: padded reduce-scatter, then all-to-all."""
    if (others := layer.expert_tensor_parallel_size - 1) > 0:
        sent_bytes = exact(others * traffic.largest_gathered_rows * row_bytes)
        yield term("reduce_scatter", "expt_tp", sent_bytes)
    if layer.expert_model_parallel_size > 1:
        sent_bytes = exact(traffic.num_rows_received * row_bytes)
        yield term("all_to_all", "ep", sent_bytes)
