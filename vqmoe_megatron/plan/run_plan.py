"""The plan of a run: everything that follows from a recipe and a number of ranks, without ranks.

Parameters, weights, gradients, optimizer state and wire bytes are exact; activations are an
estimate from saved tensors; times come from assumed hardware. Communicates nothing, needs no torch.

As one JSON object it is the contract of ``vqmoe plan --json``. Always there: ``world_size``,
``hardware``, ``rank_grid``, ``parameters``, ``memory_bytes``, ``flops_per_step``,
``wire_bytes_per_step``, ``step_time``, ``errors``, ``assumptions``, ``excluded``. With errors the
figures are null and ``rank_grid`` is empty. With a code memory also ``code_memory``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.flops import RunFlops, run_flops
from vqmoe_megatron.plan.grid import code_owners, rank_grid, rank_groups
from vqmoe_megatron.plan.hardware import Hardware, hardware_profile
from vqmoe_megatron.plan.kernels import Row
from vqmoe_megatron.plan.layout import ParallelLayout, layout_errors
from vqmoe_megatron.plan.memory import EXCLUDED, StageMemory, stage_memory
from vqmoe_megatron.plan.memory_report import code_memory_json
from vqmoe_megatron.plan.parameter_count import ParameterCount, count_parameters
from vqmoe_megatron.plan.step_time import StepTime, step_time
from vqmoe_megatron.plan.step_wire import step_wire
from vqmoe_megatron.plan.uncounted import counted_layout_errors
from vqmoe_megatron.plan.wire import Exact, StepWire, Term

NOT_MEASURED = (
    "hardware figures are from data sheets and from roofs that others measured; no GPU figure was "
    "measured by this project"
)


@dataclass(frozen=True)
class Figures:
    """What a layout that can run costs."""

    layout: ParallelLayout
    parameters: ParameterCount
    memory: tuple[StageMemory, ...]  # of each pipeline stage
    flops: RunFlops
    wire: StepWire
    step_time: StepTime


@dataclass(frozen=True)
class RunPlan:
    """A recipe on ``world_size`` ranks. Every figure raises ``ValueError`` with all ``errors`` when
    the layout cannot run, or is one that no formula counts."""

    config: RunConfig
    world_size: int
    hardware: Hardware
    errors: tuple[str, ...]  # every broken rule as an equation, else what is not counted
    _figures: Figures | None

    @property
    def refusal(self) -> str:
        """The sentence over ``errors``: a layout that is not counted can run all the same."""
        is_broken = layout_errors(self.config, self.world_size, self.hardware.device)
        ranks = f"{self.world_size} rank{'s' if self.world_size != 1 else ''}"
        return f"the recipe cannot {'run' if is_broken else 'be planned'} on {ranks}"

    @property
    def figures(self) -> Figures:
        """All of them."""
        if self._figures is None:
            listing = "\n".join(f"  - {error}" for error in self.errors)
            raise ValueError(f"{self.refusal}:\n{listing}")
        return self._figures

    @property
    def layout(self) -> ParallelLayout:
        """The sizes, resolved."""
        return self.figures.layout

    @property
    def parameters(self) -> ParameterCount:
        """Elements in total, used by one token, and per rank."""
        return self.figures.parameters

    @property
    def memory_bytes(self) -> int:
        """Peak of the fullest rank."""
        return max(stage.peak for stage in self.figures.memory)

    @property
    def flops_per_step(self) -> int:
        """Executed by all ranks in an optimizer step, recompute included."""
        return self.figures.flops.all_ranks.total

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, all ranks, per token of the batch; without recompute."""
        return self.figures.flops.per_token

    @property
    def wire_bytes_per_step(self) -> int:
        """Sent by the busiest rank in an optimizer step, rounded up to whole bytes."""
        return ceil(self.figures.wire.sent_bytes)

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        return self.config.train.global_batch_size * self.config.model.seq_length

    @property
    def step_time(self) -> StepTime:
        """Predicted, not measured."""
        return self.figures.step_time

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's peak is within the device's memory."""
        return self.memory_bytes <= self.hardware.memory_bytes


def plan_run(config: RunConfig, world_size: int, hardware: Hardware | str | None = None) -> RunPlan:
    """Plan ``config`` on ``world_size`` ranks.

    Args:
        config: with ``model.vocab_size`` set (a corpus has it; nothing is read here).
        world_size: ranks.
        hardware: a profile or its name; None: CPU for ``train.device=cpu``, else H100.

    Raises:
        ValueError: for an unknown vocabulary size or unknown hardware. A layout that cannot run is
            no exception: it is in ``errors``.
    """
    if not isinstance(hardware, Hardware):
        hardware = hardware_profile(hardware or default_hardware(config))
    errors = tuple(counted_layout_errors(config, world_size, hardware.device))
    figures = None
    if not errors:
        layout = ParallelLayout.from_config(config, world_size)
        stages = range(layout.pipeline_model_parallel_size)
        memory = tuple(stage_memory(config, layout, s, hardware.kernels) for s in stages)
        flops = run_flops(config, layout)
        figures = Figures(
            layout=layout,
            parameters=count_parameters(config, layout),
            memory=memory,
            flops=flops,
            wire=step_wire(config, layout),
            step_time=step_time(config, layout, flops, memory, hardware),
        )
    return RunPlan(config, world_size, hardware, errors, figures)


def default_hardware(config: RunConfig) -> str:
    """Name of the profile where none is asked for."""
    return "CPU" if config.train.device == "cpu" else "H100"


def plan_json(plan: RunPlan, assumptions: Sequence[str] = ()) -> dict[str, Any]:
    """Return the plan as plain values; bytes are ints, or floats where no whole number."""
    described: dict[str, Any] = {
        "world_size": plan.world_size,
        "config": asdict(plan.config),
        "hardware": {**asdict(plan.hardware), "is_measured": False},  # every figure with its source
        "errors": list(plan.errors),
        "assumptions": [NOT_MEASURED, *assumptions],
        "excluded": list(EXCLUDED),
        "layout": None,
        "rank_grid": [],
        "groups": None,
        "owners": None,
        "parameters": None,
        "memory_bytes": None,
        "flops_per_step": None,
        "wire_bytes_per_step": None,
        "step_time": None,
    }
    if plan.errors:
        return described
    figures = plan.figures
    described["assumptions"] += figures.wire.assumptions
    if plan.config.code_memory.is_on:
        described["code_memory"] = code_memory_json(plan.config, figures.layout)
    return described | {
        "layout": layout_json(figures.layout),
        "rank_grid": [asdict(place) for place in rank_grid(figures.layout)],
        "groups": [asdict(group) for group in rank_groups(figures.layout, plan.hardware)],
        "owners": [asdict(owner) for owner in code_owners(plan.config, figures.layout)],
        "parameters": {
            "total": figures.parameters.total,
            "active": figures.parameters.active,
            "total_by_part": figures.parameters.total_by_part,
            "active_by_part": figures.parameters.active_by_part,
            "per_rank": list(figures.parameters.per_rank),
            "per_rank_by_part": list(figures.parameters.per_rank_by_part),
        },
        "memory_bytes": {
            "peak": plan.memory_bytes,
            "device": plan.hardware.memory_bytes,
            "fits": plan.fits,
            "stages": [stage.by_part() for stage in figures.memory],
        },
        "flops_per_step": {
            "total": plan.flops_per_step,
            "forward": figures.flops.all_ranks.forward,
            "backward": figures.flops.all_ranks.backward,
            "recompute": figures.flops.all_ranks.recompute,
            "by_part": figures.flops.by_part,
            "per_rank": [of_rank.total for of_rank in figures.flops.per_rank],
            "per_token": figures.flops.per_token,
            "tokens_per_step": figures.flops.num_tokens,
        },
        "wire_bytes_per_step": {
            "total": number(figures.wire.sent_bytes),
            "by_axis": {axis: number(sent) for axis, sent in figures.wire.by_axis.items()},
            "stages": [[_term_json(term) for term in stage.terms] for stage in figures.wire.stages],
        },
        "step_time": step_time_json(figures.step_time),
    }


def _term_json(term: Term) -> dict[str, Any]:
    return {
        "part": term.part,
        "collective": term.collective,
        "axis": term.axis,
        "num_calls": term.num_calls,
        "sent_bytes": number(term.sent_bytes),
    }


def layout_json(layout: ParallelLayout) -> dict[str, Any]:
    """Sizes of all axes, the data-parallel ones included."""
    return {
        **asdict(layout),
        "data_parallel_size": layout.data_parallel_size,
        "expert_data_parallel_size": layout.expert_data_parallel_size,
    }


def step_time_json(time: StepTime) -> dict[str, Any]:
    """Predicted seconds by part: the total is the sum of the rows, exposed communication, bubble
    and optimizer."""
    return {
        "is_measured": False,
        "total_seconds": time.total_seconds,
        "compute_seconds": time.compute_seconds,
        "rows": [_row_json(row) for row in time.rows],
        "exposed_communication_seconds": time.exposed_seconds,
        "overlapped_communication_seconds": time.overlapped_seconds,
        "bubble_seconds": time.bubble_seconds,
        "optimizer_seconds": time.optimizer_seconds,
        "slowest_pipeline_rank": time.pipeline_rank,
        "tokens_per_second": time.tokens_per_second,
        "model_flops_utilisation": time.model_flops_utilisation,
        "communication": [
            {**asdict(entry), "exposed_seconds": entry.exposed_seconds}
            for entry in time.communication
        ],
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "part": row.part,
        "seconds": row.seconds,
        "seconds_by_bound": row.seconds_by_bound,
        "kernels": [
            {**asdict(kernel), "seconds": seconds}
            for kernel, seconds in zip(row.kernels, row.kernel_seconds, strict=True)
        ],
    }


def number(value: Exact) -> int | float:
    """A whole number as it is, a fraction as the nearest float."""
    return value if isinstance(value, int) else float(value)
