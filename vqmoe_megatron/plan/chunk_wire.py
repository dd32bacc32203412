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
    images                                     patches are cut before they are projected: nothing;
                                               the mean over positions all-reduces fp32 [b, H]

The MoE layer's own collectives are ``wire.layer_terms``; its router adds its counts of tokens per
expert, which the balance loss needs whole. Those of a code memory are in ``memory_wire``. Recompute
repeats the forward pass in front of the backward one; the balance loss is taken in that second
forward pass only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan import memory_wire
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory_shape import MemoryShape, RowReads, carries_memory
from vqmoe_megatron.plan.parameters import ChunkPlace, is_moe_layer
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.wire import COUNT_BYTES, RowTraffic, Term, all_reduced, layer_terms

FP32_BYTES = INT32_BYTES = 4
COLUMN_PARALLEL = ("all_gather",), ("all_gather", "reduce_scatter")  # forward, backward
ROW_PARALLEL = ("reduce_scatter",), ("all_gather",)


@dataclass(frozen=True)
class MeanTraffic:
    """Rows that one rank moved, mean over its MoE layers and microbatches; bytes are linear in
    them, so the mean is as good as all of them."""

    dispatched: RowTraffic | None  # in the forward pass; None: no rows travelled
    straight_through: RowTraffic | None = None  # gradient rows of code space
    memory: RowReads | None = None  # rows of a code memory


def chunk_terms(
    config: RunConfig,
    layout: ParallelLayout,
    place: ChunkPlace,
    traffic: MeanTraffic | None = None,
) -> Iterator[Term]:
    """Return every collective that the layers of one chunk call, a repeated one each time.

    ``traffic`` is of this rank; None: balanced.
    """
    if place.is_first and not config.vision.is_on:
        yield from _embedding(config, layout)
    if config.code_memory.is_on:
        shape = MemoryShape.from_config(config, layout)
        yield from memory_wire.microbatch_terms(shape, traffic.memory if traffic else None)
    of_kind: dict[tuple[bool, ...], list[Term]] = {}  # layers of one kind send the same
    for index, number in enumerate(place.layers):
        kind = (
            is_moe_layer(config.model, number),
            _is_repeated(config, index),
            carries_memory(config, number),
        )
        if kind not in of_kind:
            of_kind[kind] = list(_layer(config, layout, traffic, *kind))
        yield from of_kind[kind]
    if place.is_last and config.vision.is_on:
        yield from _pooling(config, layout)
    elif place.is_last:
        yield from _linear(config, layout, "output", False, COLUMN_PARALLEL)
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
    has_memory: bool,
) -> Iterator[Term]:
    model = config.model
    modules: list[str] = []
    if model.recompute_granularity == "selective":
        modules = model.recompute_modules or []
    yield from _linear(config, layout, "attention", is_repeated, COLUMN_PARALLEL, ROW_PARALLEL)
    if is_moe:
        is_repeated = is_repeated or "moe" in modules
        yield from _moe(config, layout, traffic, is_repeated)
        if has_memory:
            shape = MemoryShape.from_config(config, layout)
            reads = traffic.memory if traffic else None
            yield from _again(memory_wire.layer_terms(shape, reads), is_repeated)
    else:
        is_repeated = is_repeated or "mlp" in modules
        yield from _linear(config, layout, "dense_mlp", is_repeated, COLUMN_PARALLEL, ROW_PARALLEL)


def _linear(
    config: RunConfig,
    layout: ParallelLayout,
    part: str,
    is_repeated: bool,
    *kinds: tuple[tuple[str, ...], tuple[str, ...]],
) -> Iterator[Term]:
    """Matrices of one part that are cut over the tensor ranks."""
    if moved := _moved_bytes(config, layout):
        for forward, backward in kinds:
            for collective in forward:
                yield Term(part, collective, "tp", moved)
            for collective in (*(forward if is_repeated else ()), *backward):
                yield Term(part, collective, "tp", moved, is_backward=True)


def _embedding(config: RunConfig, layout: ParallelLayout) -> Iterator[Term]:
    moved, ranks = _moved_bytes(config, layout), layout.tensor_model_parallel_size
    if not moved:
        return
    if config.model.position_embedding_type == "learned_absolute":
        whole = ranks * sequence_block_bytes(config, layout)
        yield Term("embedding", "all_reduce", "tp", all_reduced(whole, ranks))
    else:
        yield Term("embedding", "reduce_scatter", "tp", moved)
    yield Term("embedding", "all_gather", "tp", moved, is_backward=True)


def _pooling(config: RunConfig, layout: ParallelLayout) -> Iterator[Term]:
    ranks = layout.tensor_model_parallel_size
    num_bytes = FP32_BYTES * config.train.micro_batch_size * config.model.hidden_size
    if ranks > 1:
        yield Term("output", "all_reduce", "tp", all_reduced(num_bytes, ranks))


def _cross_entropy(config: RunConfig, layout: ParallelLayout) -> Iterator[Term]:
    ranks = layout.tensor_model_parallel_size
    num_bytes = FP32_BYTES * config.train.micro_batch_size * config.model.seq_length
    for _ in range(3 if ranks > 1 else 0):
        yield Term("output", "all_reduce", "tp", all_reduced(num_bytes, ranks))


def _moe(
    config: RunConfig, layout: ParallelLayout, traffic: MeanTraffic | None, is_repeated: bool
) -> Iterator[Term]:
    shape = LayerShape.from_config(config, layout)
    rows = (traffic.dispatched, traffic.straight_through) if traffic else (None, None)
    terms = (replace(term, part=f"moe {term.part}") for term in layer_terms(shape, *rows))
    yield from _again(terms, is_repeated)
    yield from _balance_loss(config, layout, is_repeated)
    yield from _again(_capacity(shape, layout), is_repeated)


def _capacity(shape: LayerShape, layout: ParallelLayout) -> Iterator[Term]:
    """Switch with a capacity: int32 choices [T, N] of every sequence shard."""
    if shape.has_router and shape.moe_router == "switch" and shape.router.capacity_factor:
        own = INT32_BYTES * shape.num_local_tokens * shape.num_moe_experts
        sent = (layout.tensor_model_parallel_size - 1) * own
        yield Term("moe capacity", "all_gather", "tp", sent)


def _again(terms: Iterable[Term], is_repeated: bool) -> Iterator[Term]:
    """Terms that send something; forward ones once more where recompute repeats them."""
    for term in terms:
        if not term.sent_bytes:
            continue
        yield term
        if is_repeated and not term.is_backward and not term.is_once_per_step:
            yield replace(term, is_backward=True)


def _balance_loss(config: RunConfig, layout: ParallelLayout, is_repeated: bool) -> Iterator[Term]:
    """Tokens per expert, summed over the ranks whose tokens the loss is about."""
    model, kind = config.model, config.model.moe_router_load_balancing_type
    has_router = config.vq.has_router(model.num_moe_experts)
    if not has_router or kind == "none" or model.moe_aux_loss_coeff == 0:
        return
    num_counts = model.num_moe_experts
    axis, ranks = "tp", layout.tensor_model_parallel_size
    if kind == "seq_aux_loss":
        num_counts *= config.train.micro_batch_size
    if kind == "global_aux_loss":
        axis, ranks = "tp_dp", ranks * layout.data_parallel_size
    if ranks > 1:
        sent = all_reduced(COUNT_BYTES * num_counts, ranks)
        yield Term("moe balance loss", "all_reduce", axis, sent, is_backward=is_repeated)


def sequence_block_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """[S / TP, b, H] of one rank, what it sends to the next pipeline stage too."""
    layer = LayerShape.from_config(config, layout)
    return layer.num_local_tokens * layer.hidden_size * layer.bytes_per_element


def _moved_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    return (layout.tensor_model_parallel_size - 1) * sequence_block_bytes(config, layout)
