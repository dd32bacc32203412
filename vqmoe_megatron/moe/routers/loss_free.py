"""Balance without a loss: a bias per expert, for the choice alone (arXiv 2408.15664).

T tokens of a step, N experts, k experts per token, u ``router.bias_update_rate``.

    s = sigmoid(W x + b)      chosen: the k largest of s + bias      weight of a chosen one: s
    once per step: bias_i <- bias_i + u sign(mean load - load_i), loads of all data

The choice is Megatron's (``moe_router_enable_expert_bias``), what surrounds it is not: Megatron
divides the k weights by their sum, counts in the forward pass, and moves the biases when gradients
are reduced, also for a step that is then skipped. Here loads are counted in the backward pass and
move the biases with the optimizer's step, in every training loop and engine, as codebooks move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.routers.step_router import StepRouter


class LossFreeRouter(StepRouter):
    """Sigmoid scores, chosen with a bias that follows the load."""

    expert_bias: torch.Tensor  # fp32 [N]
    step_load: torch.Tensor  # fp32 [N], rows per expert of the step

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.enable_expert_bias:
            raise ValueError(
                "moe_router_enable_expert_bias=True moves a bias of Megatron's own; LossFreeRouter "
                "brings its bias, so leave it at False"
            )
        device = torch.cuda.current_device()
        del self.expert_bias  # Megatron's None
        self.register_buffer("expert_bias", torch.zeros(self.num_experts, device=device))
        zeros = torch.zeros(self.num_experts, device=device)
        self.register_buffer("step_load", zeros, persistent=False)

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits ``[S, B, N]`` -> weights and map ``[T, N]``. No communication."""
        logits = self.apply_z_loss(logits.flatten(0, 1))
        _, routing_map = topk_routing_with_score_function(
            logits.detach(), self.topk, score_function="sigmoid", expert_bias=self.expert_bias
        )
        probs = torch.sigmoid(logits) * routing_map
        if self.is_trained_now:
            load = routing_map.sum(dim=0)
            probs = run_in_backward(probs, lambda: self._record(load))
        return probs, routing_map

    def _record(self, load: torch.Tensor) -> None:
        self.step_load += load.to(self.step_load.dtype)

    def local_parts(self) -> list[torch.Tensor]:
        """Rows per expert."""
        return [self.step_load]

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """How far the biases lie apart, of the step as it was routed."""
        next(parts)
        return {"expert_bias_spread": self.expert_bias.max() - self.expert_bias.min()}

    @torch.no_grad()
    def apply_parts(self, reduced: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move every bias by one rate against its load; return the scalars. No communication."""
        load = next(reduced)
        scalars = self.scalars_of(iter([load]))
        self.expert_bias += self.settings.bias_update_rate * torch.sign(load.mean() - load)
        return scalars

    def clear_step(self) -> None:
        """Forget the loads."""
        self.step_load.zero_()
