"""What the layers of a model chunk send, in one microbatch or once per step, pass by pass.

S sequence length, b micro batch size, H hidden size, e bytes per element, TP tensor ranks, N
experts. Under sequence parallelism a rank's activations are [S / TP, b, H]; a block is that many
bytes, and gathering or scattering the sequence moves (TP - 1) blocks.

    column-parallel (qkv, fc1, output layer)   forward gathers; backward gathers the input again for
                                               the weight's gradient, and scatters the input's
    row-parallel (proj, fc2)                   forward scatters; backward gathers
    word embedding                             forward scatters, backward gathers; with learned
                                               positions it all-reduces [b, S, H] instead
    cross entropy over the cut vocabulary      three fp32 all-reduces of [S, b]: the largest logit,
                                               the predicted one, the sum of exponentials

The MoE layer's own collectives are those of :mod:`wire_cost`; its router adds its counts of tokens
per expert, which the balance loss needs whole. Recompute repeats the forward pass in front of the
backward one; the balance loss is taken in that second forward pass only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.exact import Exact, exact
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.model_parameters import ChunkPlace, is_moe_layer
from vqmoe_megatron.plan.wire_cost import RowTraffic, wire_cost

FP32_BYTES = 4
COUNT_BYTES = 8  # tokens per expert are int64


@dataclass(frozen=True)
class LayerTerm:
    """One collective of one layer."""

    part: str
    collective: str
    axis: str
    sent_bytes: Exact
    is_backward: bool
    is_once_per_step: bool = False  # else once per microbatch


@dataclass(frozen=True)
class MeanTraffic:
    """Rows that one rank moved, mean over its MoE layers and microbatches; bytes are linear in
    them, so the mean is as good as all of them."""

    dispatched: RowTraffic  # in the forward pass
    straight_through: RowTraffic | None = None  # gradient rows of code space


def chunk_terms(
    config: RunConfig,
    layout: ParallelLayout,
    place: ChunkPlace,
    traffic: MeanTraffic | None = None,
) -> Iterator[LayerTerm]:
    """Return every collective that the layers of one chunk call, a repeated one each time.

    ``traffic`` is of this rank; None: balanced.
    """
    if place.is_first:
        yield from _embedding(config, layout)
    of_kind: dict[tuple[bool, bool], list[LayerTerm]] = {}  # layers of one kind send the same
    for index, number in enumerate(place.layers):
        kind = is_moe_layer(config.model, number), _is_repeated(config, index)
        if kind not in of_kind:
            of_kind[kind] = list(_layer(config, layout, traffic, *kind))
        yield from of_kind[kind]
    if place.is_last:
        yield from _column_parallel(config, layout, "output", False)
        yield from _cross_entropy(config, layout)


def _is_repeated(config: RunConfig, index: int) -> bool:
    """Whether full recompute repeats the chunk's layer ``index``."""
    model = config.model
    if model.recompute_granularity != "full":
        return False
    return model.recompute_method == "uniform" or index < (model.recompute_num_layers or 0)


def _layer(
    config: RunConfig,
    layout: ParallelLayout,
    traffic: MeanTraffic | None,
    is_moe: bool,
    is_repeated: bool,
) -> Iterator[LayerTerm]:
    model = config.model
    modules: list[str] = []
    if model.recompute_granularity == "selective":
        modules = model.recompute_modules or []
    yield from _column_parallel(config, layout, "attention", is_repeated)
    yield from _row_parallel(config, layout, "attention", is_repeated)
    if is_moe:
        yield from _moe(config, layout, traffic, is_repeated or "moe" in modules)
    else:
        yield from _column_parallel(config, layout, "dense_mlp", is_repeated or "mlp" in modules)
        yield from _row_parallel(config, layout, "dense_mlp", is_repeated or "mlp" in modules)


def _column_parallel(
    config: RunConfig, layout: ParallelLayout, part: str, is_repeated: bool
) -> Iterator[LayerTerm]:
    moved = _moved_bytes(config, layout)
    if moved:
        yield LayerTerm(part, "all_gather", "tp", moved, False)
        if is_repeated:
            yield LayerTerm(part, "all_gather", "tp", moved, True)
        yield LayerTerm(part, "all_gather", "tp", moved, True)
        yield LayerTerm(part, "reduce_scatter", "tp", moved, True)


def _row_parallel(
    config: RunConfig, layout: ParallelLayout, part: str, is_repeated: bool
) -> Iterator[LayerTerm]:
    moved = _moved_bytes(config, layout)
    if moved:
        yield LayerTerm(part, "reduce_scatter", "tp", moved, False)
        if is_repeated:
            yield LayerTerm(part, "reduce_scatter", "tp", moved, True)
        yield LayerTerm(part, "all_gather", "tp", moved, True)


def _embedding(config: RunConfig, layout: ParallelLayout) -> Iterator[LayerTerm]:
    moved, ranks = _moved_bytes(config, layout), layout.tensor_model_parallel_size
    if not moved:
        return
    if config.model.position_embedding_type == "learned_absolute":
        whole = ranks * sequence_block_bytes(config, layout)
        yield LayerTerm("embedding", "all_reduce", "tp", all_reduced(whole, ranks), False)
    else:
        yield LayerTerm("embedding", "reduce_scatter", "tp", moved, False)
    yield LayerTerm("embedding", "all_gather", "tp", moved, True)


def _cross_entropy(config: RunConfig, layout: ParallelLayout) -> Iterator[LayerTerm]:
    ranks = layout.tensor_model_parallel_size
    num_bytes = FP32_BYTES * config.train.micro_batch_size * config.model.seq_length
    for _ in range(3 if ranks > 1 else 0):
        yield LayerTerm("output", "all_reduce", "tp", all_reduced(num_bytes, ranks), False)


def _moe(
    config: RunConfig, layout: ParallelLayout, traffic: MeanTraffic | None, is_repeated: bool
) -> Iterator[LayerTerm]:
    shape = LayerShape.from_config(config, layout)
    cost = wire_cost(
        shape,
        traffic.dispatched if traffic else None,
        traffic.straight_through if traffic else None,
    )
    for term in cost.terms:
        if not term.sent_bytes:
            continue
        once = term.is_once_per_step
        part = f"moe {term.part}"
        yield LayerTerm(part, term.collective, term.group, term.sent_bytes, term.is_backward, once)
        if is_repeated and not term.is_backward and not once:
            yield LayerTerm(part, term.collective, term.group, term.sent_bytes, True)
    yield from _balance_loss(config, layout, is_repeated)


def _balance_loss(
    config: RunConfig, layout: ParallelLayout, is_repeated: bool
) -> Iterator[LayerTerm]:
    """Tokens per expert, summed over the ranks whose tokens the loss is about."""
    model, kind = config.model, config.model.moe_router_load_balancing_type
    if config.vq.path == "discrete" or kind == "none" or model.moe_aux_loss_coeff == 0:
        return
    num_counts = model.num_moe_experts
    axis, ranks = "tp", layout.tensor_model_parallel_size
    if kind == "seq_aux_loss":
        num_counts *= config.train.micro_batch_size
    if kind == "global_aux_loss":
        axis, ranks = "tp_dp", ranks * layout.data_parallel_size
    if ranks > 1:
        sent = all_reduced(COUNT_BYTES * num_counts, ranks)
        yield LayerTerm("moe balance loss", "all_reduce", axis, sent, is_repeated)


def sequence_block_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """[S / TP, b, H] of one rank, what it sends to the next pipeline stage too."""
    model = config.model
    shards = layout.tensor_model_parallel_size if layout.sequence_parallel else 1
    num_tokens = model.seq_length // (shards * layout.context_parallel_size)
    element = 2 if model.bf16 else 4
    return num_tokens * config.train.micro_batch_size * model.hidden_size * element


def _moved_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    return (layout.tensor_model_parallel_size - 1) * sequence_block_bytes(config, layout)


def all_reduced(num_bytes: int, num_ranks: int) -> Exact:
    """2 (P - 1) / P n."""
    return exact(Fraction(2 * (num_ranks - 1) * num_bytes, num_ranks))
