"""Megatron-core as the training engine.

The trainer, the count of real ranks and the simulation build with this one class, so that they
speak about the same step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.engines.engine import Engine, StepResult
from vqmoe_megatron.engines.megatron.fast_path import FastPath
from vqmoe_megatron.engines.megatron.model import build_model, build_transformer_config
from vqmoe_megatron.engines.megatron.optimizer import build_optimizer
from vqmoe_megatron.engines.megatron.step import TrainStep, run_microbatches
from vqmoe_megatron.moe.codebook_sync import CodebookSync
from vqmoe_megatron.moe.expert_engine import EngineType, ExpertEngine
from vqmoe_megatron.moe.step_owner import LayerStatistics
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.runtime.fused_parts import FusedParts, choose_parts
from vqmoe_megatron.runtime.world import choose_device
from vqmoe_megatron.tasks.task import Batch, Task


class MegatronEngine(Engine):
    """Megatron's GPTModel, DDP, optimizer and schedules."""

    def __init__(
        self,
        model: list[torch.nn.Module],
        optimizer: Any,
        scheduler: Any,
        train_step: TrainStep,
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.train_step = train_step
        self.num_microbatches = train_step.num_microbatches

    @classmethod
    def build(
        cls,
        config: RunConfig,
        layout: ParallelLayout,
        task: Task,
        expert_engine: EngineType = ExpertEngine,
        has_gloo_groups: bool = True,
        parts: FusedParts | None = None,
    ) -> MegatronEngine:
        """Build this rank's part.

        ``expert_engine`` builds that of every layer; ``has_gloo_groups`` says whether Megatron made
        gloo groups beside the others; ``parts`` None settles the recipe's switches for the device.
        Communicates as :func:`build_model` does.

        Raises:
            ValueError: for a fused kernel that the recipe asks for and that cannot be used here.
        """
        train = config.train
        if parts is None:
            parts = choose_parts(config, choose_device(train.device)[0])
        codebook_sync = CodebookSync(applies_at_once=False)
        transformer = build_transformer_config(config, layout, parts)
        transformer.finalize_model_grads_func = codebook_sync
        fast = FastPath.of(config, layout)
        model = build_model(config, transformer, layout, expert_engine, parts, fast.new_graph)
        optimizer, scheduler = build_optimizer(config, model, has_gloo_groups, parts)
        transformer.grad_scale_func = optimizer.scale_loss
        if config.optimizer.overlap_grad_reduce:
            transformer.no_sync_func = [chunk.no_sync for chunk in model]
            if len(model) == 1:
                transformer.no_sync_func = transformer.no_sync_func[0]
        train_step = TrainStep(
            task.forward_step,
            model,
            optimizer,
            scheduler,
            codebook_sync,
            layout.num_microbatches(train),
            config.model.seq_length,
            train.micro_batch_size,
            train.global_batch_size,
            task.num_sums,
        )
        built = cls(model, optimizer, scheduler, train_step)
        built.notes = fast.notes
        return built

    def step(
        self, iterators: list[Iterator[Batch]], stop_request: int, save_request: bool
    ) -> StepResult:
        """As :class:`TrainStep`."""
        return self.train_step(iterators, stop_request, save_request)

    def forward(
        self,
        iterators: list[Iterator[Batch]],
        num_microbatches: int,
        seq_length: int,
        micro_batch_size: int,
    ) -> torch.Tensor:
        """As :func:`run_microbatches`."""
        return run_microbatches(
            self.train_step.forward_step,
            self.model,
            iterators,
            num_microbatches,
            seq_length,
            micro_batch_size,
            forward_only=True,
            num_sums=self.train_step.num_sums,
        )

    @property
    def layers(self) -> list[LayerStatistics]:
        """Those of the codebooks' synchronisation."""
        return self.train_step.codebook_sync.layers
