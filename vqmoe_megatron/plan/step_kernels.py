"""All kernels of a step on one rank of a pipeline stage, by what its layers are.

A microbatch's kernels of a layer are counted once and multiplied by the number of such layers and
of microbatches; those of once per step by the number of layers. What recompute repeats of the
forward pass is a part of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.flops import repeated_modules
from vqmoe_megatron.plan.hardware import Hardware
from vqmoe_megatron.plan.kernels import FORWARD, RECOMPUTE, STEP, Kernel
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory_kernels import memory_kernels, stream_kernels
from vqmoe_megatron.plan.memory_shape import MemoryShape, carries_memory
from vqmoe_megatron.plan.moe_kernels import moe_kernels
from vqmoe_megatron.plan.parameters import (
    ChunkPlace,
    chunk_places,
    is_moe_layer,
    padded_vocab_size,
)
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.transformer_kernels import (
    CORE_ATTENTION,
    attention_kernels,
    dense_mlp_kernels,
    embedding_kernels,
    layer_element_wise,
    output_layer_kernels,
    patch_kernels,
)


@dataclass(frozen=True)
class StageCounts:
    """What a stage holds, and of how many of its layers what is repeated."""

    num_layers: int = 0
    num_moe_layers: int = 0
    whole_repeated: int = 0  # layers whose attention and element-wise work are repeated
    core_repeated: int = 0  # of the others, those whose core attention is
    moe_repeated: int = 0
    dense_repeated: int = 0
    num_memory_layers: int = 0
    memory_repeated: int = 0
    num_streams: int = 0  # of codes, on chunks behind the first
    num_sources: int = 0  # on the first chunk
    num_embeddings: int = 0
    num_heads: int = 0


class StepKernels:
    """Kernels of one recipe at one layout, for any of its stages."""

    def __init__(self, config: RunConfig, layout: ParallelLayout, hardware: Hardware) -> None:
        self.config, self.layout = config, layout
        layer = LayerShape.from_config(config, layout)
        self.num_microbatches = layer.num_microbatches
        self._attention = list(attention_kernels(config, layout, hardware))
        self._element_wise = list(layer_element_wise(config, layout, layer))
        self._dense = list(dense_mlp_kernels(config, layout))
        self._moe = list(moe_kernels(config.model, layer, hardware))
        self._memory: list[Kernel] = []
        self._stream: list[Kernel] = []
        self._source: list[Kernel] = []
        if config.code_memory.is_on:
            self._add_memory(hardware.device)
        self._embedding = list(
            patch_kernels(config, layout, layer)
            if config.vision.is_on
            else embedding_kernels(config, layer)
        )
        self._head = list(output_layer_kernels(config, layout))

    def _add_memory(self, device: str) -> None:
        shape = MemoryShape.from_config(self.config, self.layout)
        vocab = padded_vocab_size(self.config.model)
        first, other = (ChunkPlace(range(0), is_first, False) for is_first in (True, False))
        self._memory += memory_kernels(shape, device)
        self._source += stream_kernels(shape, vocab, first)
        self._stream += stream_kernels(shape, vocab, other)

    def counts(self, pipeline_rank: int) -> StageCounts:
        """Of one stage."""
        model = self.config.model
        found = dict.fromkeys(vars(StageCounts()), 0)
        for place in chunk_places(model, self.layout, pipeline_rank):
            found["num_embeddings"] += place.is_first
            found["num_heads"] += place.is_last
            found["num_sources"] += place.is_first
            found["num_streams"] += not place.is_first
            for index, number in enumerate(place.layers):
                again, is_moe = repeated_modules(model, index), is_moe_layer(model, number)
                found["num_layers"] += 1
                found["num_moe_layers"] += is_moe
                found["whole_repeated"] += "layer" in again
                found["core_repeated"] += "core_attn" in again
                found["moe_repeated"] += is_moe and bool(again & {"layer", "moe"})
                if carries_memory(self.config, number):
                    found["num_memory_layers"] += 1
                    found["memory_repeated"] += bool(again & {"layer", "moe"})
                found["dense_repeated"] += not is_moe and bool(again & {"layer", "mlp"})
        return StageCounts(**found)

    def of(self, counts: StageCounts) -> Iterator[Kernel]:
        """All kernels of a step."""
        num_dense = counts.num_layers - counts.num_moe_layers
        for kernels, number, repeated in (
            (self._attention, counts.num_layers, counts.whole_repeated),
            (self._element_wise, counts.num_layers, counts.whole_repeated),
            (self._moe, counts.num_moe_layers, counts.moe_repeated),
            (self._dense, num_dense, counts.dense_repeated),
            (self._memory, counts.num_memory_layers, counts.memory_repeated),
            (self._source, counts.num_sources, 0),
            (self._stream, counts.num_streams, 0),
            (self._embedding, counts.num_embeddings, 0),
            (self._head, counts.num_heads, 0),
        ):
            yield from self._of_step(kernels, number)
            yield from self._again(kernels, repeated, lambda kernel: True)
        yield from self._again(
            self._attention, counts.core_repeated, lambda k: k.name.startswith(CORE_ATTENTION)
        )

    def _of_step(self, kernels: list[Kernel], number: int) -> Iterator[Kernel]:
        if number:
            for kernel in kernels:
                is_once = kernel.phase == STEP
                yield kernel.times(number * (1 if is_once else self.num_microbatches))

    def _again(
        self, kernels: list[Kernel], number: int, is_repeated: Callable[[Kernel], bool]
    ) -> Iterator[Kernel]:
        if number:
            for kernel in kernels:
                if kernel.phase == FORWARD and is_repeated(kernel):
                    repeated = kernel.times(number * self.num_microbatches)
                    yield replace(repeated, part=RECOMPUTE, name=f"{kernel.part}: {kernel.name}")
