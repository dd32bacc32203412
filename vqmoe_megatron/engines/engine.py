"""What a training engine is: it builds a model for a layout and takes its steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.moe.step_owner import LayerStatistics
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.tasks.task import Batch, Task


@dataclass(frozen=True)
class StepResult:
    """What one step did; equal on all ranks except the times."""

    loss: float  # nats per token
    grad_norm: float
    learning_rate: float
    skipped: bool
    stop_request: int  # the highest request any rank raised
    save_requested: bool  # by any rank
    core_seconds: float  # forward, backward, communication, optimizer


class Engine(ABC):
    """One rank's model, optimizer and schedule, and the step that moves them.

    ``optimizer`` and ``scheduler`` answer as Megatron's do to what checkpoints ask
    (``checkpoint/state.py``), so that any engine resumes what any other saved.
    """

    model: list[torch.nn.Module]  # one chunk per virtual pipeline stage
    optimizer: Any
    scheduler: Any
    num_microbatches: int  # of this rank in a step
    notes: tuple[str, ...] = ()  # what was asked for and is not done here, with the reason

    @classmethod
    @abstractmethod
    def build(cls, config: RunConfig, layout: ParallelLayout, task: Task) -> Engine:
        """Build this rank's part in a joined world with its process groups.

        Raises:
            ValueError: for a layout or setting that the engine cannot do, with the reason.
        """

    @abstractmethod
    def step(
        self, iterators: list[Iterator[Batch]], stop_request: int, save_request: bool
    ) -> StepResult:
        """Take one step; the requests are this rank's, the result holds those of all ranks."""

    @abstractmethod
    def forward(
        self,
        iterators: list[Iterator[Batch]],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
    ) -> torch.Tensor:
        """Evaluate microbatches: fp64 ``[num_sums]`` of the task, summed loss and scored tokens
        first, on every rank."""

    @property
    @abstractmethod
    def layers(self) -> list[LayerStatistics]:
        """What the VQMoE layers of this rank saw in the last step, reduced over replicas."""
