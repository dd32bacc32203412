"""SMoE-Dropout's router: frozen as it was drawn, more and more experts (arXiv 2303.01610).

N experts, t optimizer steps that were taken, S ``router.schedule_steps``.

    k(t) = min(k_max, k_min + round((k_max - k_min) t / S))

from ``router.min_topk`` (as published N / 2) to ``model.moe_router_topk`` (as published N). Logits
and weights are Megatron's. The paper evaluates a trained model at any k, at N / 2 and at N:
``router.eval_topk`` says which; null evaluates at the k that is trained, which after training is
k_max. t counts steps that were taken, so a skipped one leaves it, as do evaluation and recompute.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vqmoe_megatron.moe.routers.step_router import CountsSteps


def topk_at(step: int, num_steps: int, min_topk: int, max_topk: int) -> int:
    """k after ``step`` of ``num_steps``; halves are rounded up, in whole numbers."""
    grown = (2 * (max_topk - min_topk) * min(step, num_steps) + num_steps) // (2 * num_steps)
    return min_topk + grown


class SMoEDropoutRouter(CountsSteps):
    """A frozen random router whose number of experts per token grows."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.min_topk = self.setting("min_topk")
        self.schedule_steps = self.setting("schedule_steps")
        if not self.min_topk <= self.config.moe_router_topk:
            raise ValueError(
                f"router.min_topk <= moe_router_topk fails: {self.min_topk} > "
                f"{self.config.moe_router_topk}; experts per token grow to moe_router_topk"
            )
        self.steps_changed()

    def steps_changed(self) -> None:
        """Set ``topk``, of training and of evaluation."""
        eval_topk = self.settings.eval_topk
        if not self.training and eval_topk is not None:
            self.topk = eval_topk
            return
        self.topk = topk_at(
            self.num_steps, self.schedule_steps, self.min_topk, self.config.moe_router_topk
        )

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """k of the step as it was routed."""
        return {"router_topk": torch.full_like(self.steps_taken, self.topk, dtype=torch.float32)}

    def train(self, mode: bool = True) -> SMoEDropoutRouter:
        """Switch between training and evaluation, which may have another k."""
        super().train(mode)
        self.steps_changed()
        return self
