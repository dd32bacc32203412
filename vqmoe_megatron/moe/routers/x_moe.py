"""X-MoE's router: cosines in a space of few dimensions (arXiv 2204.09179, section 3).

T tokens, N experts, H hidden size, d dimensions (``router.low_dim``, as published N / 2).

    s[t, i] = (R x_t) . e_i / (|R x_t| |e_i| tau)      R [d, H], e [N, d], tau learned

and then Megatron's softmax, top-k and balance losses over s. ``router.variant=released``, the form
of VQMoE's release, brings only the experts to unit length and has no temperature.

tau starts at ``router.initial_temperature``, for a softmax 0.3, and is held above LEAST_TAU:
nothing in the formula keeps it from crossing zero. Scale and shape of the first R and e hardly
matter, since only directions count, so they are drawn as every other weight.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import router_gating_linear

from vqmoe_megatron.moe.routers.step_router import ROUTER_DTYPES, StepRouter

LEAST_TAU = 0.01


class XMoERouter(StepRouter):
    """Low-dimensional, normalised scores."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.weight, self.bias  # of the linear router
        low_dim = self.setting("low_dim")
        self.projection_weight = self.new_weight(low_dim, self.config.hidden_size)
        self.expert_weight = self.new_weight(self.num_experts, low_dim)
        self.temperature = None
        if self.settings.variant == "published":
            start = torch.full((1,), self.settings.initial_temperature)
            self.temperature = self.replicated(start.to(self.expert_weight.device))

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[S, B, H]`` -> scores ``[S, B, N]`` in ``moe_router_dtype``."""
        dtype = ROUTER_DTYPES.get(self.config.moe_router_dtype, input.dtype)
        low = router_gating_linear(input, self.projection_weight, None, dtype)
        experts = torch.nn.functional.normalize(self.expert_weight.to(dtype), dim=-1)
        if self.temperature is None:
            return low @ experts.t()
        cosines = torch.nn.functional.normalize(low, dim=-1) @ experts.t()
        return cosines / self.temperature.to(dtype).clamp(min=LEAST_TAU)
