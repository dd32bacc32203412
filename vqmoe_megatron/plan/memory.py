"""Memory of the rank that needs most on each pipeline stage, and what is left out.

Weights, gradients, optimizer and statistics are exact (``state_memory``); activations, tables and
buffers are estimates from saved tensors (``activation_memory``), of equally loaded experts. What
is made when the step ends, and activations are gone, is in ``step_end_memory``.

How many microbatches' activations are alive follows from Megatron's 1F1B and interleaved schedules:
PP stages, VPP chunks per stage. A stage runs w forward passes ahead, then one forward and one
backward pass in turn, then the w backward passes that are left:

    1F1B          w = PP - 1 - stage
    interleaved   w = 2 (PP - 1 - stage) + (VPP - 1) PP, in passes of one chunk

Interleaved chunks take turns every PP microbatches, forwards from the first chunk, backwards from
the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, cycle, islice, repeat
from operator import sub

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.activation_memory import (
    activation_bytes,
    chunk_activation_bytes,
    recompute_peak_bytes,
    saved_bytes,
)
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.logits import logits_shape
from vqmoe_megatron.plan.memory_activations import transient_bytes
from vqmoe_megatron.plan.memory_shape import MemoryShape, num_memory_layers
from vqmoe_megatron.plan.parameters import (
    chunk_places,
    is_moe_layer,
    num_moe_layers,
)
from vqmoe_megatron.plan.shape import LayerShape
from vqmoe_megatron.plan.state_memory import StateBytes, state_bytes
from vqmoe_megatron.plan.step_end_memory import (
    held_candidate_bytes,
    save_bytes,
    step_end_bytes,
)
from vqmoe_megatron.plan.transformer_xl import transient_bytes as score_transient_bytes

EXCLUDED = (
    "fragmentation and caching of the allocator",
    "buffers of NCCL or gloo",
    "the CUDA context, cuBLAS and compiled kernels",
    "uneven expert load: rows are counted as if experts were equally loaded",
    "data loader, tokenizer and the Python process",
    "a checkpoint on the host while it is written (async_save on the CPU forks the process)",
    "evaluation, which keeps nothing for a backward pass",
)


@dataclass(frozen=True)
class StageMemory:
    """Of the fullest rank of one pipeline stage."""

    pipeline_rank: int
    state: StateBytes
    activations: int  # of all microbatches in flight, without code tables
    code_tables: int  # code rows and tables of code outputs, of all microbatches in flight
    recomputed: int  # made anew at one time in the backward pass
    dispatch_buffers: int  # rows on their way, of one layer at a time, those of a memory included
    workspace: int  # largest weight gradient, bf16 logits beside their softmax, relative scores
    head: int  # contained in activations: gone when the backward pass comes to a layer
    candidates: int  # tokens kept for dead codes while microbatches follow
    step_end: int  # temporaries of codebooks and optimizer, when activations are gone
    save: int  # gathered of the distributed optimizer's state, between steps

    @property
    def transient(self) -> int:
        """What is alive within a pass only; not all at once, so the largest counts."""
        in_a_layer = self.recomputed + self.dispatch_buffers - self.head
        return max(in_a_layer, self.workspace)

    @property
    def step_peak(self) -> int:
        """State, and either everything in flight with the largest transient, or the step's end."""
        in_flight = self.activations + self.code_tables + self.candidates
        return self.state.total + max(in_flight + self.transient, self.step_end)

    @property
    def peak(self) -> int:
        """Of a step or of a save."""
        return max(self.step_peak, self.state.total + self.save)

    def by_part(self) -> dict[str, int]:
        """Bytes by part, in the order of the report."""
        remembered = self.state.segment_memory
        return {
            "weights": self.state.weights,
            "gradients": self.state.gradients,
            "optimizer": self.state.optimizer,
            "codebook_statistics": self.state.statistics,
            **({"segment_memory": remembered} if remembered else {}),
            "activations": self.activations,
            "code_tables": self.code_tables,
            "dispatch_buffers": self.dispatch_buffers,
            "recomputed": self.recomputed,
            "workspace": self.workspace,
            "candidates": self.candidates,
            "step_end": self.step_end,
            "save": self.save,
            "peak": self.peak,
        }


def stage_memory(
    config: RunConfig,
    layout: ParallelLayout,
    pipeline_rank: int,
    kernels: str,
    state: StateBytes | None = None,
) -> StageMemory:
    """Return the memory of a stage's first data-parallel rank, which has the fullest shards.

    ``state`` is what the stage keeps from step to step, if the caller knows it already; batch sizes
    do not change it.

    Raises:
        ValueError: for unknown kernels, or an unknown vocabulary size.
    """
    model, train = config.model, config.train
    places = chunk_places(model, layout, pipeline_rank)
    kept = activation_bytes(config, layout, kernels)
    num_microbatches = layout.num_microbatches(train)
    schedule = (layout.pipeline_model_parallel_size, pipeline_rank, num_microbatches)
    chunks = [chunk_activation_bytes(config, place, kept) for place in places]
    tables = [_kept_tables(config, kept.code_tables, place.layers) for place in places]
    in_flight = peak_in_flight(chunks, *schedule)
    tables_in_flight = peak_in_flight(tables, *schedule)
    state = state or state_bytes(config, layout, pipeline_rank)
    workspace = max(state.largest_weight, score_transient_bytes(config, layout))
    if places[-1].is_last:
        answers, columns = logits_shape(config, layout)
        # Megatron's cross entropy turns fp32 logits into the softmax, which is kept, and that into
        # the gradient, in place; bf16 logits, and later their gradient, stand beside it.
        workspace = max(workspace, answers * columns * 2 if model.bf16 else 0)
    buffers = _dispatch_bytes(config, layout) if num_moe_layers(model, places) else 0
    if num_memory_layers(config, places):
        buffers += transient_bytes(MemoryShape.from_config(config, layout))
    candidates = 0
    num_before = num_microbatches - (layout.pipeline_model_parallel_size - pipeline_rank)
    if num_before > 0:
        # Some activations are at their most after a first backward pass.
        candidates = held_candidate_bytes(config, layout, pipeline_rank, num_before)
    return StageMemory(
        pipeline_rank=pipeline_rank,
        state=state,
        activations=in_flight - tables_in_flight,
        code_tables=tables_in_flight,
        recomputed=max(recompute_peak_bytes(config, place, kept) for place in places),
        dispatch_buffers=buffers,
        workspace=workspace,
        head=kept.head if places[-1].is_last else 0,
        candidates=candidates,
        step_end=step_end_bytes(config, layout, pipeline_rank),
        save=save_bytes(config, layout, pipeline_rank),
    )


def _kept_tables(config: RunConfig, table_bytes: int, layers: range) -> int:
    """Tables that a chunk keeps between its passes; recomputed layers keep none."""
    model = config.model
    modules = model.recompute_modules or []
    if model.recompute_granularity == "selective" and "moe" in modules:
        return 0
    numbers = list(layers)
    if model.recompute_granularity == "full":
        is_block = model.recompute_method == "block"
        numbers = numbers[model.recompute_num_layers or 1 :] if is_block else []
    return table_bytes * sum(is_moe_layer(model, number) for number in numbers)


def _dispatch_bytes(config: RunConfig, layout: ParallelLayout) -> int:
    """Rows sent and rows arrived of one layer, out and back, and what code space makes in its
    backward pass: rows anew, later the table's gradient, and the same before its norm."""
    layer = LayerShape.from_config(config, layout)
    row_bytes = layer.hidden_size * layer.bytes_per_element
    shards = layer.expert_tensor_parallel_size
    kept = saved_bytes(layer)
    is_normed = layer.vq.norm != "none" and layer.vq.num_code_slices == 1
    table_gradients = (2 if is_normed else 1) * kept.table_bytes
    return 2 * (1 + shards) * layer.num_travelling_rows * row_bytes + max(
        kept.transient_bytes, table_gradients
    )


def num_warmup_passes(num_stages: int, num_chunks: int, stage: int, num_microbatches: int) -> int:
    """w: forward passes of one chunk before the first backward pass."""
    ahead = num_stages - 1 - stage
    if num_chunks > 1:
        ahead = 2 * ahead + (num_chunks - 1) * num_stages
    return min(ahead, num_microbatches * num_chunks)


def peak_in_flight(
    chunk_bytes: Sequence[int], num_stages: int, stage: int, num_microbatches: int
) -> int:
    """Most bytes that a stage holds between its passes, when chunk c keeps ``chunk_bytes[c]``.

    Equal chunks are counted. Otherwise walks the schedule; what lies behind two rounds of chunks
    repeats itself and is left out.
    """
    num_chunks = len(chunk_bytes)
    period = num_stages * num_chunks
    warmup = num_warmup_passes(num_stages, num_chunks, stage, num_microbatches)
    num_passes = min(num_microbatches * num_chunks, warmup + 2 * period)
    if len(set(chunk_bytes)) == 1:
        return min(warmup + 1, num_passes) * chunk_bytes[0]

    def in_turn(chunks: Iterable[int]) -> Iterator[int]:
        turns = [chunk for chunk in chunks for _ in range(num_stages)]
        return accumulate(islice(cycle(turns), num_passes))

    freed = chain(repeat(0, warmup + 1), in_turn(reversed(chunk_bytes)))
    return max(map(sub, in_turn(chunk_bytes), freed), default=0)
