"""Bytes that one rank sends in one optimizer step: every collective of the training loop.

In the order of the step:
  1. the layers of all microbatches                ``chunk_wire``
  2. activations and gradients between stages      ``_pipeline_terms``
  3. gradients over replicas, then over the tensor ranks and the two ends of the pipeline that
     share a parameter                             ``_gradient_terms``
  4. codes of a code memory's vocabulary, until they are frozen: ``memory_wire.stream_terms``; one
     all-reduce of codebook statistics             ``_statistics_terms``
  5. loss sums, flags, the gradient norm           ``_control_terms``
  6. parameters of the distributed optimizer       ``_parameter_terms``

Not part of a step: evaluation, logging, checkpoints, the first sight of data, replica checks.
``runtime/collective_counter.py`` counts the same on real ranks and on a fake process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.chunk_wire import (
    FP32_BYTES,
    MeanTraffic,
    chunk_terms,
    sequence_block_bytes,
)
from vqmoe_megatron.plan.codebook_bytes import MAX_CANDIDATES
from vqmoe_megatron.plan.ends import num_head_classes
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory_shape import MemoryShape, num_memory_layers
from vqmoe_megatron.plan.memory_wire import stream_terms
from vqmoe_megatron.plan.parameters import (
    Parameter,
    chunk_places,
    num_moe_layers,
    padded_vocab_size,
    stage_parameters,
)
from vqmoe_megatron.plan.router_cost import num_router_sums
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.state_memory import (
    GRADIENT_BYTES,
    NUM_THRESHOLD_SUMS,
    GradientBuffer,
    stage_buffers,
)
from vqmoe_megatron.plan.wire import StageWire, StepWire, Term, all_reduced, others_share, summed

SUM_BYTES = 8  # fp64: loss, scored tokens; with classes also how many were found
FLAG_BYTES = 12  # int32: a bad step, a stop request, a save request
TOKEN_COUNT_BYTES = 4  # int32, with calculate_per_token_loss
# Replicated over tensor ranks that see different shards of the sequence.
SEQUENCE_PARALLEL_PARTS = ("norms", "router", "codebooks", "learned_inputs", "gates", "patches")
ROW_PARALLEL_BIASES = ("linear_proj.bias", "linear_fc2.bias")
BALANCED = "rows are spread evenly over the experts' ranks"


def step_wire(config: RunConfig, layout: ParallelLayout) -> StepWire:
    """Return what a rank of every pipeline stage sends in one step, with balanced loads.

    Args:
        config: with ``model.vocab_size`` set.
        layout: one that passed the check.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    stages = range(layout.pipeline_model_parallel_size)
    return StepWire(
        tuple(stage_wire(config, layout, stage) for stage in stages),
        _assumptions(config, layout),
    )


def stage_wire(
    config: RunConfig,
    layout: ParallelLayout,
    pipeline_rank: int,
    traffic: MeanTraffic | None = None,
) -> StageWire:
    """Return what one rank of one stage sends; ``traffic`` is what it counted, None: balanced."""
    parts = (
        _layer_terms(config, layout, pipeline_rank, traffic),
        _pipeline_terms(config, layout, pipeline_rank),
        _gradient_terms(config, layout, pipeline_rank),
        _stream_terms(config, layout, pipeline_rank),
        _statistics_terms(config, layout, pipeline_rank),
        _control_terms(config, layout, pipeline_rank),
        _parameter_terms(config, layout, pipeline_rank),
    )
    return StageWire(pipeline_rank, tuple(t for terms in parts for t in terms if t.sent_bytes))


def _assumptions(config: RunConfig, layout: ParallelLayout) -> tuple[str, ...]:
    sentences = [
        BALANCED,
        "a step of training only: no evaluation, no log line, no checkpoint",
        "an all-reduce of n bytes over P ranks sends 2 (P - 1) / P n from each",
    ]
    if config.optimizer.use_distributed_optimizer and not config.optimizer.overlap_param_gather:
        sentences.append(
            "without optimizer.overlap_param_gather every parameter is gathered twice: Megatron's "
            "dense and expert optimizers each gather all of them"
        )
    layer = LayerShape.from_config(config, layout)
    if layer.has_router and layer.moe_router == "smoe_dropout":
        sentences.append(f"the last steps of the schedule, with k = {layer.moe_router_topk}")
    if layer.has_router and layer.moe_router == "stable_moe" and num_router_sums(layer):
        sentences.append(f"a step of stage 1, of {layer.router.stage_1_steps}")
    if config.code_memory.is_on:
        sentences.append(
            "a microbatch reads distinct rows of the code memory as if reads were spread evenly, "
            "which is the most; codes that repeat are fewer rows"
        )
        if MemoryShape.from_config(config, layout).moves:
            sentences.append(
                "a step before code_memory.freeze_after_steps="
                f"{config.code_memory.freeze_after_steps}; later ones find no codes"
            )
    return tuple(sentences)


def _layer_terms(
    config: RunConfig, layout: ParallelLayout, stage: int, traffic: MeanTraffic | None
) -> Iterator[Term]:
    microbatches = layout.num_microbatches(config.train)
    terms = (
        term
        for place in chunk_places(config.model, layout, stage)
        for term in chunk_terms(config, layout, place, traffic)
    )
    kinds = summed(terms, lambda t: (t.part, t.collective, t.axis), microbatches)
    for (part, collective, axis), (calls, sent) in kinds.items():
        yield Term(part, collective, axis, sent, calls)


def _pipeline_terms(config: RunConfig, layout: ParallelLayout, stage: int) -> Iterator[Term]:
    """Every chunk's output goes to the next stage, round the corner too, and its gradient back."""
    stages = layout.pipeline_model_parallel_size
    if stages == 1:
        return
    places = chunk_places(config.model, layout, stage)
    forward = sum(not place.is_last for place in places)
    backward = sum(not place.is_first for place in places)
    calls = layout.num_microbatches(config.train) * (forward + backward)
    yield Term("pipeline", "send", "pp", calls * sequence_block_bytes(config, layout), calls)


def _gradient_terms(config: RunConfig, layout: ParallelLayout, stage: int) -> Iterator[Term]:
    chunks = stage_parameters(config, layout, stage)
    for buckets in _bucket_groups(config, layout, stage):
        ranks, axis = buckets.num_ranks, buckets.axis
        num_bytes = GRADIENT_BYTES * buckets.num_elements
        if config.optimizer.use_distributed_optimizer:
            sent = others_share(num_bytes, ranks)
            yield Term("gradients", "reduce_scatter", axis, sent)
        else:
            yield Term("gradients", "all_reduce", axis, all_reduced(num_bytes, ranks))
    tensor_ranks = layout.tensor_model_parallel_size
    if layout.sequence_parallel:
        shared = sum(
            p.num_elements for chunk in chunks for p in chunk if p.is_trained and _sees_a_shard(p)
        )
        sent_over_tp = all_reduced(GRADIENT_BYTES * shared, tensor_ranks)
        yield Term("shared gradients", "all_reduce", "tp", sent_over_tp)
    stages = layout.pipeline_model_parallel_size
    is_tied = not config.model.untie_embeddings_and_output_weights
    if is_tied and stages > 1 and stage in (0, stages - 1):
        rows = padded_vocab_size(config.model) // tensor_ranks
        num_bytes = GRADIENT_BYTES * rows * config.model.hidden_size
        sent_by_ends = all_reduced(num_bytes, 2)
        yield Term("tied embeddings", "all_reduce", "embedding", sent_by_ends)


def _sees_a_shard(parameter: Parameter) -> bool:
    is_bias = parameter.name.endswith(ROW_PARALLEL_BIASES)
    return is_bias or parameter.part in SEQUENCE_PARALLEL_PARTS


def _statistics_terms(config: RunConfig, layout: ParallelLayout, stage: int) -> Iterator[Term]:
    """CodebookSync: per MoE layer expert loads [N], gate sums [2], what the router sums; with a
    codebook also losses [3], usage [C, K], the moving sums' tokens [C, K, D] and M candidates
    [M, C, D], with threshold routing pairs by score and tokens; all fp32."""
    model, vq = config.model, config.vq
    shape = LayerShape.from_config(config, layout)
    num_layers = num_moe_layers(model, chunk_places(model, layout, stage))
    elements = num_layers * (model.num_moe_experts + 2 + num_router_sums(shape))
    if vq.threshold_routing:
        elements += num_layers * NUM_THRESHOLD_SUMS
    if vq.has_codes:
        elements += num_layers * _codebook_elements(shape)
    if config.code_memory.is_on:
        elements += _memory_elements(config, layout, stage)
    ranks = layout.tensor_model_parallel_size * layout.data_parallel_size
    sent = all_reduced(FP32_BYTES * elements, ranks)
    yield Term("codebook statistics", "all_reduce", "tp_dp", sent)


def _codebook_elements(layer: LayerShape) -> int:
    width = layer.vq.num_code_slices * layer.code_width
    elements = 3 + layer.num_code_rows + min(layer.vq.num_codes, MAX_CANDIDATES) * width
    if layer.vq.codebook_update == "ema":
        elements += layer.num_code_rows * layer.code_width
    return elements


def _memory_elements(config: RunConfig, layout: ParallelLayout, stage: int) -> int:
    """Of a code memory: reads by row, and two sums of distinct rows; codebooks of hidden states; on
    the first stage, until codes are frozen, tokens seen [V] and of contexts usage [Kc], sums
    [Kc, d] and candidates [M, d]."""
    memory, shape = config.code_memory, MemoryShape.from_config(config, layout)
    if memory.codes == "hidden":
        places = chunk_places(config.model, layout, stage)
        of_layer = shape.num_usage_sums + _codebook_elements(shape.hidden_layer)
        return num_memory_layers(config, places) * of_layer
    if stage:
        return 0
    if not shape.moves:
        return shape.num_usage_sums
    contexts = memory.num_context_codes
    of_contexts = contexts + (contexts + shape.num_context_candidates) * memory.context_dim
    tokens = padded_vocab_size(config.model)
    return shape.num_usage_sums + tokens + (of_contexts if contexts else 0)


def _stream_terms(config: RunConfig, layout: ParallelLayout, stage: int) -> Iterator[Term]:
    if config.code_memory.is_on and stage == 0:
        shape, vocab = MemoryShape.from_config(config, layout), padded_vocab_size(config.model)
        yield from stream_terms(shape, vocab, layout.pipeline_model_parallel_size)


def _control_terms(config: RunConfig, layout: ParallelLayout, stage: int) -> Iterator[Term]:
    stages, replicas = layout.pipeline_model_parallel_size, layout.data_parallel_size
    is_last = stage == stages - 1
    if is_last:
        sent = SUM_BYTES * (2 if num_head_classes(config) is None else 3)
        yield Term("loss", "all_reduce", "dp", all_reduced(sent, replicas))
        yield Term("loss", "broadcast", "pp", (stages - 1) * sent)
    if config.model.calculate_per_token_loss:
        if is_last:
            yield Term("token count", "broadcast", "pp", (stages - 1) * TOKEN_COUNT_BYTES)
        counts = all_reduced(TOKEN_COUNT_BYTES, replicas)
        yield Term("token count", "all_reduce", "dp", counts)
    flags = all_reduced(FLAG_BYTES, layout.world_size)
    yield Term("flags", "all_reduce", "world", flags)
    groups = {"tp_pp": layout.dense_ranks, "expt_tp_ep_pp": layout.expert_ranks}
    if config.optimizer.use_distributed_optimizer:
        groups = {"world": layout.world_size}
    for axis, ranks in groups.items():
        yield Term("gradient norm", "all_reduce", axis, all_reduced(FP32_BYTES, ranks))


def _parameter_terms(config: RunConfig, layout: ParallelLayout, stage: int) -> Iterator[Term]:
    """Each chained optimizer, dense and expert, gathers all parameters, unless the next forward
    pass gathers what it comes to."""
    if not config.optimizer.use_distributed_optimizer:
        return
    times = 1 if config.optimizer.overlap_param_gather else 2
    for buckets in _bucket_groups(config, layout, stage):
        ranks = buckets.num_ranks
        sent = others_share(times * buckets.num_parameter_bytes, ranks)
        yield Term("parameters", "all_gather", buckets.axis, sent, times)


@dataclass(frozen=True)
class _BucketGroup:
    """Buckets that one call reduces or gathers, padding included."""

    axis: str
    num_ranks: int
    num_elements: int
    num_parameter_bytes: int


def _bucket_groups(config: RunConfig, layout: ParallelLayout, stage: int) -> Iterator[_BucketGroup]:
    """Each bucket by itself; those of an interleaved chunk behind the first all together."""
    joined: dict[tuple, list[tuple[GradientBuffer, int]]] = {}
    for number, buffer in enumerate(stage_buffers(config, layout, stage)):
        for index, (start, end) in enumerate(buffer.buckets):
            alone = (number, index) if buffer.chunk == 0 else None
            key = buffer.chunk, buffer.is_expert, alone
            joined.setdefault(key, []).append((buffer, end - start))
    for (_, is_expert, _), buckets in joined.items():
        yield _BucketGroup(
            axis="expt_dp" if is_expert else "dp",
            num_ranks=buckets[0][0].num_ranks,
            num_elements=sum(size for _, size in buckets),
            num_parameter_bytes=sum(b.bytes_per_element * size for b, size in buckets),
        )
