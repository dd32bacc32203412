"""Bytes of what a rank keeps from step to step: weights, gradients, optimizer, buffers.

    weights     parameters in the model's dtype, codes in fp32; the padding of the distributed
                optimizer's buffers
    gradients   one fp32 element per element of the buffers, frozen codebooks none
    main        fp32 copies of bf16 parameters; of fp32 parameters none, they are the model's own
    moments     Adam's two, fp32, of this rank's elements
    statistics  usage, moving sums and step accumulators of the codebooks, the fixed projection of
                low_dim, code maps, expert loads, codes of a code memory's vocabulary
    memory      of Transformer-XL: hidden states of every microbatch and layer (``transformer_xl``)

With the distributed optimizer main copies and moments are of the rank's shard. Adam's step counters
(4 bytes per tensor, on the host) are left out.

Megatron's DDP lays the trained parameters of a chunk into one buffer per kind (dense or expert) and
dtype, in reverse order. With the distributed optimizer each parameter starts at a multiple of 64
elements and each bucket ends at a multiple of lcm(ranks, 128), so that every data-parallel rank
gets an equal shard of every bucket. Buckets are cut only on the first chunk of the first pipeline
stage and only with ``overlap_grad_reduce``, besides tied embeddings, which have one of their own.
Follows ``_ParamAndGradBuffer`` of megatron-core 0.16.1; a test compares with the real buffers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.codebook_bytes import assigner_bytes
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory_state import memory_buffer_bytes
from vqmoe_megatron.plan.parameters import (
    Parameter,
    chunk_places,
    num_moe_layers,
    num_token_ids,
    stage_parameters,
)
from vqmoe_megatron.plan.router_cost import router_buffer_bytes
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.transformer_xl import segment_memory_bytes

PARAMETER_ALIGNMENT = 64  # elements; of Megatron's _pad_start_of_param_if_needed
BUCKET_ALIGNMENT = 128  # elements; of Megatron's _pad_end_of_bucket_if_needed
MINIMUM_BUCKET = 40_000_000  # elements; of Megatron's DistributedDataParallel
BUCKET_PER_RANK = 1_000_000
GRADIENT_BYTES = 4  # grad_reduce_in_fp32
NUM_THRESHOLD_SUMS = 4096 + 4  # of moe/routing_threshold.py: pairs by score, tokens by pairs
MAIN_BYTES = MOMENT_BYTES = 4


@dataclass(frozen=True)
class GradientBuffer:
    """One buffer of one model chunk on one rank."""

    chunk: int
    is_expert: bool
    bytes_per_element: int  # of the parameters
    num_ranks: int  # that share it: the data-parallel or expert-data-parallel group
    is_distributed: bool  # by the distributed optimizer
    buckets: tuple[tuple[int, int], ...]  # [start, end) in elements, padding included
    spans: tuple[tuple[int, int], ...]  # [start, end) of each parameter

    @property
    def num_elements(self) -> int:
        """Of the whole buffer, padding included."""
        return self.buckets[-1][1]

    def shard_elements(self, rank: int) -> int:
        """Parameter elements, without padding, in the shards that one rank of the group owns; all
        of them without the distributed optimizer."""
        return sum(self.pieces(rank))

    def pieces(self, rank: int) -> list[int]:
        """The same, piece by piece: what the optimizer takes for one parameter."""
        if not self.is_distributed:
            return [end - start for start, end in self.spans]
        owned = []
        for start, end in self.buckets:
            share = (end - start) // self.num_ranks
            low, high = start + rank * share, start + (rank + 1) * share
            owned += [max(0, min(high, b) - max(low, a)) for a, b in self.spans]
        return owned


def stage_buffers(
    config: RunConfig, layout: ParallelLayout, pipeline_rank: int
) -> list[GradientBuffer]:
    """Return the buffers of one rank of a pipeline stage, chunk by chunk, dense before experts."""
    buffers = []
    for chunk, parameters in enumerate(stage_parameters(config, layout, pipeline_rank)):
        limit = None
        if config.optimizer.overlap_grad_reduce and pipeline_rank == 0 and chunk == 0:
            limit = max(MINIMUM_BUCKET, BUCKET_PER_RANK * layout.data_parallel_size)
        for is_expert in (False, True):
            trained = [p for p in parameters if p.is_trained and p.is_expert == is_expert]
            for element in dict.fromkeys(p.bytes_per_element for p in trained):
                of_kind = [p for p in trained if p.bytes_per_element == element]
                buffers.append(_buffer(config, layout, chunk, of_kind, limit))
    return buffers


def _buffer(
    config: RunConfig,
    layout: ParallelLayout,
    chunk: int,
    parameters: list[Parameter],
    limit: int | None,
) -> GradientBuffer:
    is_expert = parameters[0].is_expert
    num_ranks = layout.expert_data_parallel_size
    if not is_expert:
        num_ranks = layout.data_parallel_size * layout.context_parallel_size
    is_distributed = config.optimizer.use_distributed_optimizer
    alignment = lcm(num_ranks, BUCKET_ALIGNMENT) if is_distributed else 1
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = end = 0
    is_open = False  # whether the current bucket holds a parameter
    for parameter in reversed(parameters):
        start = _padded(end, PARAMETER_ALIGNMENT) if is_distributed else end
        is_alone = parameter.is_shared_embedding and is_distributed
        if is_alone and is_open:
            start = _padded(start, alignment)
            buckets.append((bucket_start, start))
            bucket_start = start
        end = start + parameter.num_elements
        spans.append((start, end))
        is_open = True
        if is_alone or (limit is not None and end - bucket_start >= limit):
            end = _padded(end, alignment)
            buckets.append((bucket_start, end))
            bucket_start, is_open = end, False
    if is_open:
        buckets.append((bucket_start, _padded(end, alignment)))
    return GradientBuffer(
        chunk=chunk,
        is_expert=is_expert,
        bytes_per_element=parameters[0].bytes_per_element,
        num_ranks=num_ranks,
        is_distributed=is_distributed,
        buckets=tuple(buckets),
        spans=tuple(spans),
    )


def _padded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class StateBytes:
    """Of one rank."""

    weights: int
    gradients: int
    main_parameters: int
    moments: int
    statistics: int
    segment_memory: int  # of Transformer-XL, full
    largest_weight: int  # contained in weights: its gradient is a tensor of its own for a moment

    @property
    def optimizer(self) -> int:
        """Main copies and moments."""
        return self.main_parameters + self.moments

    @property
    def total(self) -> int:
        """All of it."""
        kept = self.statistics + self.segment_memory
        return self.weights + self.gradients + self.optimizer + kept


def state_bytes(
    config: RunConfig,
    layout: ParallelLayout,
    pipeline_rank: int,
    data_rank: int = 0,
    expert_data_rank: int = 0,
) -> StateBytes:
    """Return what a rank at this place of the grid keeps.

    The distributed optimizer's shards differ by a few padded elements: the last rank has fewest.

    Raises:
        ValueError: when the vocabulary size is not known.
    """
    weights = gradients = main = moments = largest = 0
    for chunk in stage_parameters(config, layout, pipeline_rank):
        for parameter in chunk:
            is_buffered = parameter.is_trained and config.optimizer.use_distributed_optimizer
            weights += 0 if is_buffered else parameter.num_bytes
            largest = max(largest, parameter.num_bytes if parameter.is_trained else 0)
    for buffer in stage_buffers(config, layout, pipeline_rank):
        if buffer.is_distributed:
            weights += buffer.num_elements * buffer.bytes_per_element
        gradients += buffer.num_elements * GRADIENT_BYTES
        owned = sum(buffer.pieces(expert_data_rank if buffer.is_expert else data_rank))
        moments += 2 * MOMENT_BYTES * owned
        if buffer.bytes_per_element < MAIN_BYTES:
            main += MAIN_BYTES * owned
    places = chunk_places(config.model, layout, pipeline_rank)
    statistics = num_moe_layers(config.model, places) * layer_statistics_bytes(config, layout)
    return StateBytes(
        weights=weights,
        gradients=gradients,
        main_parameters=main,
        moments=moments,
        statistics=statistics + memory_buffer_bytes(config, layout, places),
        segment_memory=segment_memory_bytes(config, layout, [n for p in places for n in p.layers]),
        largest_weight=largest,
    )


def layer_statistics_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """Buffers of one VQMoE layer after its first step, fp32 and int64 also in bf16 training; every
    rank of the layer keeps them all."""
    layer = LayerShape.from_config(config, layout)
    num_bytes = (layer.num_moe_experts + 2) * 4  # load per expert, gate
    num_bytes += router_buffer_bytes(layer, num_token_ids(config))
    if layer.vq.threshold_routing:  # tau, the step's scores and tokens
        num_bytes += (1 + NUM_THRESHOLD_SUMS) * 4
    return num_bytes + assigner_bytes(layer) if layer.vq.has_codes else num_bytes
