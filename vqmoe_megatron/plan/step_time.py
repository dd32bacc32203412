"""The predicted time of an optimizer step: an alpha-beta model over assumed hardware.

Per stage, m microbatches, P ranks of a group of which r share a node, n bytes sent by a rank:

    compute        per microbatch the larger of operations / achievable FLOP/s and three times the
                   weights / memory bandwidth (forward, input and weight gradients; a fourth time
                   under full recompute)
    collective     calls * hops * alpha + n / beta; hops log2(P), twice that for an all-reduce, 1
                   for a send
      within a node        NVLink's alpha and beta
      across nodes         all-gather, reduce-scatter, all-reduce: r rings, so n / r over each
                           rank's network port, or n over NVLink if that is slower; all-to-all: its
                           share for other nodes, (P - r) / (P - 1); a send: all of it
    bubble         (PP - 1) / VPP microbatches
    optimizer      state read and written once / memory bandwidth

Overlapped: with overlap_grad_reduce gradients hide behind one microbatch's backward pass, with
overlap_param_gather parameters behind one forward pass, in the interleaved schedule sends behind
compute. Everything else is exposed. Left out: element-wise operations, kernel launches, data
loading, stragglers, contention, uneven expert load.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, log2

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.flops import RunFlops
from vqmoe_megatron.plan.grid import AxisPlace, axis_place
from vqmoe_megatron.plan.hardware import Hardware
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory import StageMemory
from vqmoe_megatron.plan.step_wire import stage_wire
from vqmoe_megatron.plan.wire import Term

# Parts of the wire that travel once per step, behind the last microbatch.
ONCE_PER_STEP = (
    *("gradients", "shared gradients", "tied embeddings", "codebook statistics"),
    *("loss", "token count", "flags", "gradient norm", "parameters"),
)


@dataclass(frozen=True)
class AxisTime:
    """Communication of one part over one axis in a step."""

    part: str
    axis: str
    link: str  # intra_node | inter_node
    sent_bytes: float
    seconds: float
    overlapped_seconds: float

    @property
    def exposed_seconds(self) -> float:
        """What the step waits for."""
        return self.seconds - self.overlapped_seconds


@dataclass(frozen=True)
class StepTime:
    """Of the slowest pipeline stage, by which all others are paced."""

    hardware: str
    pipeline_rank: int
    flop_seconds: float  # of all microbatches
    weight_read_seconds: float
    communication: tuple[AxisTime, ...]
    bubble_seconds: float
    optimizer_seconds: float
    num_tokens: int  # of the global batch
    model_flops_per_rank: float  # forward and backward, mean over all ranks
    peak_flops_per_second: float

    @property
    def compute_seconds(self) -> float:
        """The larger of operations and weight reads."""
        return max(self.flop_seconds, self.weight_read_seconds)

    @property
    def exposed_seconds(self) -> float:
        """Communication that the step waits for."""
        return sum(entry.exposed_seconds for entry in self.communication)

    @property
    def overlapped_seconds(self) -> float:
        """Communication hidden behind compute."""
        return sum(entry.overlapped_seconds for entry in self.communication)

    @property
    def total_seconds(self) -> float:
        """One step."""
        parts = (self.compute_seconds, self.exposed_seconds, self.bubble_seconds)
        return sum(parts) + self.optimizer_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of the whole job."""
        return self.num_tokens / self.total_seconds

    @property
    def model_flops_utilisation(self) -> float:
        """Forward and backward operations per second and rank, as a share of the peak."""
        return self.model_flops_per_rank / self.total_seconds / self.peak_flops_per_second


def step_time(
    config: RunConfig,
    layout: ParallelLayout,
    flops: RunFlops,
    memory: tuple[StageMemory, ...],
    hardware: Hardware,
) -> StepTime:
    """Predict a step from the stages whose memory is given; the slowest of them paces it."""
    times = (_stage_time(config, layout, flops, stage, hardware) for stage in memory)
    return max(times, key=lambda time: time.total_seconds)


def least_seconds(
    config: RunConfig, layout: ParallelLayout, flops: RunFlops, hardware: Hardware
) -> float:
    """Return what no step of this layout can be faster than: operations and their bubble."""
    bubble = bubble_microbatches(layout) / layout.num_microbatches(config.train)
    rate = hardware.flops_per_second(config.model.bf16)
    ends = (flops.per_rank[0], flops.per_rank[-1])
    return max(end.total for end in ends) / rate * float(1 + bubble)


def bubble_microbatches(layout: ParallelLayout) -> Fraction:
    """Idle time of a stage in a step, (PP - 1) / VPP, in forward and backward passes of whole
    microbatches, whatever their number is."""
    chunks = layout.virtual_pipeline_model_parallel_size or 1
    return Fraction(layout.pipeline_model_parallel_size - 1, chunks)


def _stage_time(
    config: RunConfig,
    layout: ParallelLayout,
    run: RunFlops,
    memory: StageMemory,
    hardware: Hardware,
) -> StepTime:
    state, flops = memory.state, run.per_rank[memory.pipeline_rank]
    microbatches = layout.num_microbatches(config.train)
    flop_rate = hardware.flops_per_second(config.model.bf16)
    read_rate = hardware.memory_bytes_per_second * hardware.achievable_memory
    reads = 4 if config.model.recompute_granularity == "full" else 3
    flop_seconds = flops.total / flop_rate
    weight_read_seconds = reads * microbatches * state.weights / read_rate
    compute = max(flop_seconds, weight_read_seconds) / microbatches  # of one microbatch
    forward_share = flops.forward / flops.total if flops.total else 0.0
    hides = {
        "gradients": (1 - forward_share) * compute if config.optimizer.overlap_grad_reduce else 0.0,
        "parameters": forward_share * compute if config.optimizer.overlap_param_gather else 0.0,
    }
    if layout.virtual_pipeline_model_parallel_size is not None:
        hides["pipeline"] = compute * microbatches
    entries = []
    for term in stage_wire(config, layout, memory.pipeline_rank).terms:
        place = axis_place(layout, term.axis, hardware.devices_per_node)
        seconds = term_seconds(term, place, hardware)
        hidden = min(seconds, hides.get(term.part, 0.0))
        hides[term.part] = hides.get(term.part, 0.0) - hidden
        sent = float(term.sent_bytes)
        entries.append(AxisTime(term.part, term.axis, place.link, sent, seconds, hidden))
    in_schedule = sum(e.exposed_seconds for e in entries if e.part not in ONCE_PER_STEP)
    bubble = bubble_microbatches(layout)
    touched = 2 * state.optimizer + state.gradients + state.weights
    return StepTime(
        hardware=hardware.name,
        pipeline_rank=memory.pipeline_rank,
        flop_seconds=flop_seconds,
        weight_read_seconds=weight_read_seconds,
        communication=tuple(entries),
        bubble_seconds=float(bubble) * (compute + in_schedule / microbatches),
        optimizer_seconds=touched / read_rate,
        num_tokens=run.num_tokens,
        model_flops_per_rank=run.all_ranks.model / layout.world_size,
        peak_flops_per_second=hardware.peak_flops_per_second(config.model.bf16),
    )


def term_seconds(term: Term, place: AxisPlace, hardware: Hardware) -> float:
    """alpha-beta time of all calls of one term, on the link its worst group needs."""
    ranks, near = place.num_ranks, hardware.intra_node
    sent, share = float(term.sent_bytes), hardware.achievable_link
    hops = 1 if term.collective == "send" else ceil(log2(max(ranks, 2)))
    hops *= 2 if term.collective == "all_reduce" else 1
    if not place.spans_nodes:
        return term.num_calls * hops * near.alpha_seconds + sent / (near.bytes_per_second * share)
    far = hardware.inter_node
    if term.collective == "all_to_all":
        leaving = sent * (ranks - place.ranks_per_node) / (ranks - 1)
        bytes_seconds = max(
            leaving / far.bytes_per_second, (sent - leaving) / near.bytes_per_second
        )
    elif term.collective in ("send", "broadcast"):
        bytes_seconds = sent / far.bytes_per_second
    else:
        through_port = sent / place.ranks_per_node / far.bytes_per_second
        bytes_seconds = max(through_port, sent / near.bytes_per_second)
    return term.num_calls * hops * far.alpha_seconds + bytes_seconds / share
