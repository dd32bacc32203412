"""Everything one training step needs, built for a layout: model, optimizer, schedule, codebooks.

The trainer, the count of real ranks and the simulation build with this one function, so that they
speak about the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.engines.megatron.model import build_model, build_transformer_config
from vqmoe_megatron.engines.megatron.optimizer import build_optimizer
from vqmoe_megatron.engines.megatron.step import TrainStep
from vqmoe_megatron.moe.codebook_sync import CodebookSync
from vqmoe_megatron.moe.expert_engine import EngineType, ExpertEngine
from vqmoe_megatron.plan.layout import ParallelLayout


@dataclass(frozen=True)
class StepParts:
    """One rank's step and what it acts on."""

    model: list[torch.nn.Module]  # one chunk per virtual pipeline stage
    optimizer: Any
    scheduler: Any
    codebook_sync: CodebookSync
    step: TrainStep


def build_step(
    config: RunConfig,
    layout: ParallelLayout,
    engine: EngineType = ExpertEngine,
    has_gloo_groups: bool = True,
) -> StepParts:
    """Build this rank's parts in a joined world with its process groups.

    ``engine`` builds the expert engine of every layer; ``has_gloo_groups`` says whether Megatron
    made gloo groups beside the others.

    Communicates as :func:`build_model` does.
    """
    train = config.train
    # Megatron's tracker is global and sized for the first model of a process.
    get_moe_layer_wise_logging_tracker().clear()
    codebook_sync = CodebookSync(applies_at_once=False)
    transformer = build_transformer_config(config, layout)
    transformer.finalize_model_grads_func = codebook_sync
    model = build_model(config, transformer, layout, engine)
    optimizer, scheduler = build_optimizer(config, model, has_gloo_groups)
    transformer.grad_scale_func = optimizer.scale_loss
    if config.optimizer.overlap_grad_reduce:
        transformer.no_sync_func = [chunk.no_sync for chunk in model]
        if len(model) == 1:
            transformer.no_sync_func = transformer.no_sync_func[0]
    step = TrainStep(
        model,
        optimizer,
        scheduler,
        codebook_sync,
        layout.num_microbatches(train.global_batch_size, train.micro_batch_size),
        config.model.seq_length,
        train.micro_batch_size,
        train.global_batch_size,
    )
    return StepParts(model, optimizer, scheduler, codebook_sync, step)
