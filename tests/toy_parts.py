"""The parts of the toy package that need Megatron, each as short as one of its kind can be."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from vqmoe_megatron.engines.megatron.engine import MegatronEngine
from vqmoe_megatron.moe.routers.topk import BalancedRouter
from vqmoe_megatron.tasks.pretrain import Pretrain

STILL_LR = 3.25e-4


class MirroredRouter(BalancedRouter):
    """A router: the learned one, read from its other end."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """``[S, B, H]`` -> logits ``[S, B, N]``."""
        return super().gating(input).flip(-1)


class StillSchedule(OptimizerParamScheduler):
    """A learning-rate schedule: one rate for ever."""

    def get_lr(self, param_group: dict) -> float:
        """The rate of every group."""
        return STILL_LR


class Doubled(Pretrain):
    """A fine-tuning task: pretraining, each error counted twice."""

    def forward_step(self, iterator, model):  # noqa: ANN001, ANN201
        """As pretraining's, with twice the loss."""
        output, loss = super().forward_step(iterator, model)

        def twice(losses: torch.Tensor) -> tuple:
            total, num_tokens, report = loss(losses)
            factor = report["loss"].new_tensor([2.0, 1.0])
            return 2 * total, num_tokens, {"loss": report["loss"] * factor}

        return output, twice


class CountingEngine(MegatronEngine):
    """An engine around another: writes down every step it takes."""

    @classmethod
    def build(cls, config, layout, task):  # noqa: ANN001, ANN206
        """As Megatron's."""
        engine = super().build(config, layout, task)
        engine.file = Path(config.train.output_dir) / f"steps_{torch.distributed.get_rank()}.txt"
        return engine

    def step(self, iterators, stop_request, save_request):  # noqa: ANN001, ANN201
        """As Megatron's, and a line."""
        with self.file.open("a") as file:
            file.write("step\n")
        return super().step(iterators, stop_request, save_request)
