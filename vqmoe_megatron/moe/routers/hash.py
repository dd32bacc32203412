"""Hash routing: a token's expert is a fixed function of its id (arXiv 2106.04426).

V vocabulary entries (padded), N experts, T tokens.

    expert(id) = p(id) mod N        weight 1

p is a permutation of the V ids, drawn from (seed, layer number), so that every expert has V / N
ids, up to one: the paper's random hash, a fixed table. Nothing is learned, and ids that are
frequent make experts busy. The table is a buffer, which checkpoints hold: a run that goes on keeps
its hash, whatever its seed.
"""

from __future__ import annotations

from typing import Any

import torch

from vqmoe_megatron.moe.routers.step_router import StepRouter
from vqmoe_megatron.moe.token_stream import TokenStream


def told_tokens(router: StepRouter) -> TokenStream:
    """The stream of a router that cannot do without.

    Raises:
        ValueError: where there is none.
    """
    if router.tokens is None:
        raise ValueError(
            f"{type(router).__name__} routes by token ids and was built without them; give "
            "LayerRouter(name, settings, tokens=TokenStream(...)) to get_vqmoe_block_spec and "
            "attach the stream to the model (attach_token_stream)"
        )
    return router.tokens


def hash_table(vocab_size: int, num_experts: int, seed: int, layer_number: int) -> torch.Tensor:
    """int64 ``[V]``: the expert of every token id."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer_number)
    return torch.randperm(vocab_size, generator=generator) % num_experts


class HashRouter(StepRouter):
    """Experts by token id."""

    expert_of_token: torch.Tensor  # int64 [V]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        del self.weight, self.bias  # of the linear router
        if self.topk != 1:
            raise ValueError(f"moe_router_topk={self.topk}: a token id has one expert; use 1")
        size = told_tokens(self).vocab_size
        device = torch.cuda.current_device()
        empty = torch.zeros(size, dtype=torch.int64, device=device)
        self.register_buffer("expert_of_token", empty)

    def set_layer_number(self, layer_number: int) -> None:
        """Draw this layer's table."""
        super().set_layer_number(layer_number)
        size = self.expert_of_token.numel()
        self.expert_of_token.copy_(hash_table(size, self.num_experts, self.seed, layer_number))

    def forward(
        self, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[S, B, H]`` -> weights, fp32 (fp64 for fp64 states), and map ``[T, N]``.
        No communication."""
        experts = self.expert_of_token[told_tokens(self).own_ids(input)]
        routing_map = torch.nn.functional.one_hot(experts, self.num_experts).bool()
        dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
        return routing_map.to(dtype), routing_map
