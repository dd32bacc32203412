"""Bytes of what a rank keeps from step to step: weights, gradients, optimizer, buffers.

    weights     parameters in the model's dtype, codes in fp32; the padding of the distributed
                optimizer's buffers
    gradients   one fp32 element per element of the buffers, frozen codebooks none
    main        fp32 copies of bf16 parameters; of fp32 parameters none, they are the model's own
    moments     Adam's two, fp32, of this rank's elements
    statistics  usage, moving sums and step accumulators of the codebooks, the fixed projection of
                low_dim, code maps, expert loads

With the distributed optimizer main copies and moments are of the rank's shard. Adam's step counters
(4 bytes per tensor, on the host) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.gradient_buffers import GRADIENT_BYTES, stage_buffers
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.model_parameters import chunk_places, is_moe_layer, stage_parameters

NUM_PROBES = 256  # of vq/codebook.py: tokens kept to measure how many change their code
MAX_CANDIDATES = 4096  # of moe/code_assigner.py: tokens per step that may replace dead codes
MAIN_BYTES = MOMENT_BYTES = 4
ID_BYTES = 8


@dataclass(frozen=True)
class StateBytes:
    """Of one rank."""

    weights: int
    gradients: int
    main_parameters: int
    moments: int
    statistics: int
    largest_weight: int  # contained in weights: its gradient is a tensor of its own for a moment

    @property
    def optimizer(self) -> int:
        """Main copies and moments."""
        return self.main_parameters + self.moments

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.statistics


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
        owned = buffer.shard_elements(expert_data_rank if buffer.is_expert else data_rank)
        moments += 2 * MOMENT_BYTES * owned
        if buffer.bytes_per_element < MAIN_BYTES:
            main += MAIN_BYTES * owned
    places = chunk_places(config.model, layout, pipeline_rank)
    num_layers = sum(is_moe_layer(config.model, n) for place in places for n in place.layers)
    return StateBytes(
        weights=weights,
        gradients=gradients,
        main_parameters=main,
        moments=moments,
        statistics=num_layers * layer_statistics_bytes(config, layout),
        largest_weight=largest,
    )


def layer_statistics_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """Buffers of one VQMoE layer after its first step, fp32 and int64 also in bf16 training; every
    rank of the layer keeps them all."""
    layer, vq = LayerShape.from_config(config, layout), config.vq
    num_bytes = (layer.num_moe_experts + 2) * 4  # load per expert, gate
    if layer.path == "continuous":
        return num_bytes
    rows, width = layer.num_code_rows, layer.code_width
    num_bytes += 3 * 4  # losses
    num_bytes += 2 * rows * 4 + 1 + ID_BYTES  # usage, step counts; initialised; steps
    num_bytes += rows * ID_BYTES  # code map
    if vq.codebook_update == "ema":
        num_bytes += 2 * rows * width * 4  # moving sums, the step's sums
    if layer.code_dim is not None:
        num_bytes += layer.code_dim * layer.hidden_size * 4  # projection
    num_candidates = min(layer.num_codes, MAX_CANDIDATES)
    num_probes = min(NUM_PROBES, num_candidates)
    slices = layer.num_code_slices
    return num_bytes + num_probes * slices * (width * 4 + ID_BYTES)
