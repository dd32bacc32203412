"""The predicted time of an optimizer step: an alpha-beta model over assumed hardware.

Per stage, m microbatches, P ranks of a group of which r share a node, n bytes sent by a rank:

    kernels        each on the unit it runs on (``kernels.py``), one after the other; a row per part
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
compute. Everything else is exposed. The step is the sum of its kernels' rows, exposed
communication, bubble and optimizer. Left out: a host that falls behind its device, products too
small for their unit's roof, data loading, stragglers, contention, uneven expert load.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, log2

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.flops import RunFlops
from vqmoe_megatron.plan.grid import AxisPlace, axis_place
from vqmoe_megatron.plan.hardware import Hardware
from vqmoe_megatron.plan.kernels import FORWARD, RECOMPUTE, STEP, Row, rows_of
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.memory import StageMemory
from vqmoe_megatron.plan.step_kernels import StepKernels
from vqmoe_megatron.plan.step_wire import stage_wire
from vqmoe_megatron.plan.wire import Term

# Parts of the wire that travel once per step, behind the last microbatch.
ONCE_PER_STEP = (
    *("gradients", "shared gradients", "tied embeddings", "codebook statistics"),
    "code memory codes",
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
    rows: tuple[Row, ...]  # kernels of all microbatches, and those of once per step
    communication: tuple[AxisTime, ...]
    bubble_seconds: float
    optimizer_seconds: float
    num_tokens: int  # of the global batch
    model_flops_per_rank: float  # forward and backward, mean over all ranks
    peak_flops_per_second: float

    @property
    def compute_seconds(self) -> float:
        """All rows, without the optimizer."""
        return sum(row.seconds for row in self.rows)

    @property
    def exposed_seconds(self) -> float:
        """Communication that the step waits for."""
        return sum(entry.exposed_seconds for entry in self.communication)

    @property
    def overlapped_seconds(self) -> float:
        """Communication hidden behind compute."""
        return sum(entry.overlapped_seconds for entry in self.communication)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of everything that the step waits for, by name; the step is their sum."""
        return {row.part: row.seconds for row in self.rows} | {
            "communication": self.exposed_seconds,
            "pipeline bubble": self.bubble_seconds,
            "optimizer": self.optimizer_seconds,
        }

    @property
    def total_seconds(self) -> float:
        """One step."""
        return sum(self.parts.values())

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
    compute = Compute(config, layout, hardware)
    times = (_stage_time(config, layout, flops, stage, compute) for stage in memory)
    return max(times, key=lambda time: time.total_seconds)


def least_seconds(config: RunConfig, layout: ParallelLayout, hardware: Hardware) -> float:
    """Return what no step of this layout can be faster than: kernels of the first and the last
    stage, and their bubble."""
    compute = Compute(config, layout, hardware)
    bubble = float(bubble_microbatches(layout))
    ends = (compute.of_stage(0), compute.of_stage(layout.pipeline_model_parallel_size - 1))
    return max(end.seconds + bubble * end.microbatch_seconds for end in ends)


@dataclass(frozen=True)
class StageCompute:
    """Kernels of one stage's step."""

    rows: tuple[Row, ...]
    seconds: float
    microbatch_seconds: float  # of one microbatch
    forward_seconds: float  # of one microbatch, recompute left out


class Compute:
    """Kernels of every stage; equal stages are counted once."""

    def __init__(self, config: RunConfig, layout: ParallelLayout, hardware: Hardware) -> None:
        self.hardware = hardware
        self.num_microbatches = layout.num_microbatches(config.train)
        self._kernels = StepKernels(config, layout, hardware)
        self._found: dict[object, StageCompute] = {}

    def of_stage(self, pipeline_rank: int) -> StageCompute:
        """Rows and seconds of one rank of the stage."""
        counts = self._kernels.counts(pipeline_rank)
        if counts not in self._found:
            self._found[counts] = self._timed(rows_of(self._kernels.of(counts), self.hardware))
        return self._found[counts]

    def _timed(self, rows: tuple[Row, ...]) -> StageCompute:
        seconds = {FORWARD: 0.0, STEP: 0.0}
        for row in rows:
            for kernel, of_kernel in zip(row.kernels, row.kernel_seconds, strict=True):
                if kernel.phase in seconds and row.part != RECOMPUTE:
                    seconds[kernel.phase] += of_kernel
        total = sum(row.seconds for row in rows)
        return StageCompute(
            rows=rows,
            seconds=total,
            microbatch_seconds=(total - seconds[STEP]) / self.num_microbatches,
            forward_seconds=seconds[FORWARD] / self.num_microbatches,
        )


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
    compute: Compute,
) -> StepTime:
    state, hardware = memory.state, compute.hardware
    microbatches = compute.num_microbatches
    stage = compute.of_stage(memory.pipeline_rank)
    backward = stage.microbatch_seconds - stage.forward_seconds
    hides = {
        "gradients": backward if config.optimizer.overlap_grad_reduce else 0.0,
        "parameters": stage.forward_seconds if config.optimizer.overlap_param_gather else 0.0,
    }
    if layout.virtual_pipeline_model_parallel_size is not None:
        hides["pipeline"] = stage.microbatch_seconds * microbatches
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
        rows=stage.rows,
        communication=tuple(entries),
        bubble_seconds=float(bubble) * (stage.microbatch_seconds + in_schedule / microbatches),
        optimizer_seconds=touched / hardware.memory_roof_bytes_per_second,
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
