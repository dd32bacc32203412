"""The plan of a run: everything that follows from a recipe and a number of ranks, without ranks.

Parameters, weights, gradients, optimizer state and wire bytes are exact; activations are an
estimate from saved tensors; times come from assumed hardware. Communicates nothing, needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.hardware import Hardware, hardware_profile
from vqmoe_megatron.plan.layout import ParallelLayout, layout_errors
from vqmoe_megatron.plan.model_parameters import padded_vocab_size
from vqmoe_megatron.plan.parameter_count import ParameterCount, count_parameters
from vqmoe_megatron.plan.run_flops import RunFlops, run_flops
from vqmoe_megatron.plan.run_memory import StageMemory, stage_memory
from vqmoe_megatron.plan.step_time import StepTime, step_time
from vqmoe_megatron.plan.step_wire import stage_wire, step_wire
from vqmoe_megatron.plan.step_wire_terms import StepWire


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
    the layout cannot run."""

    config: RunConfig
    world_size: int
    hardware: Hardware
    errors: tuple[str, ...]  # every broken rule as an equation
    _figures: Figures | None

    @property
    def figures(self) -> Figures:
        """All of them."""
        if self._figures is None:
            listing = "\n".join(f"  - {error}" for error in self.errors)
            raise ValueError(f"the recipe cannot run on {self.world_size} ranks:\n{listing}")
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
    def num_active_parameters(self) -> int:
        """Elements that one token uses, as :mod:`parameter_count` defines it."""
        return self.figures.parameters.active

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
    padded_vocab_size(config.model)
    if not isinstance(hardware, Hardware):
        hardware = hardware_profile(hardware or default_hardware(config))
    device = "cpu" if hardware.name == "CPU" else "cuda"
    errors = tuple(layout_errors(config, world_size, device))
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
            step_time=predict(config, layout, memory, hardware, flops),
        )
    return RunPlan(config, world_size, hardware, errors, figures)


def predict(
    config: RunConfig,
    layout: ParallelLayout,
    memory: tuple[StageMemory, ...],
    hardware: Hardware,
    flops: RunFlops,
) -> StepTime:
    """Predict a step from the stages whose memory is given; the slowest of them paces it."""
    wires = tuple(stage_wire(config, layout, stage.pipeline_rank) for stage in memory)
    return step_time(config, layout, flops, memory, wires, hardware)


def default_hardware(config: RunConfig) -> str:
    """Name of the profile where none is asked for."""
    return "CPU" if config.train.device == "cpu" else "H100"
