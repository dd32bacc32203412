"""Switch's router: one expert per token, up to a capacity (arXiv 2101.03961).

S sequence length, B batch, T tokens of the whole microbatch, N experts, c capacity factor.

An expert takes at most ceil(T / N * c) tokens of a microbatch, the first that come, as published:
by place in their sequences, then by sequence. The others pass the layer by: their weight is zero.
Probabilities are the softmax over all experts.

Megatron's ``moe_expert_capacity_factor`` drops among the tokens of one rank, so which tokens are
dropped would depend on the layout: a sequence cut over ranks is several small batches there. It
keeps the most likely, so that later tokens decide about earlier ones, and repeated tokens, which
are equally likely but for rounding, are dropped by their rounding. Here the ranks of a microbatch
(``tp_cp``) bring their choices together. Microbatches are a setting of the training, not of the
layout.

A dropped token's row still goes to its expert, with weight zero, as rows have fixed numbers here;
the metric ``moe/dropped_tokens`` says how many, and expert loads are what tokens asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import get_capacity

from vqmoe_megatron.moe.backward_hook import run_in_backward
from vqmoe_megatron.moe.context_cut import (
    gathered_in_order,
    gathered_shards,
    own_part,
    own_shard,
)
from vqmoe_megatron.moe.routers.step_router import StepRouter


class SwitchRouter(StepRouter):
    """Top-1 with a capacity over the whole microbatch."""

    step_dropped: torch.Tensor  # fp32 [2]: dropped tokens, tokens

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        if self.topk != 1 or not config.moe_router_pre_softmax:
            raise ValueError(
                f"moe_router_topk={self.topk}, moe_router_pre_softmax="
                f"{config.moe_router_pre_softmax}: Switch sends a token to one expert, with its "
                "probability among all; use 1 and True"
            )
        if config.moe_expert_capacity_factor is not None:
            raise ValueError(
                f"moe_expert_capacity_factor={config.moe_expert_capacity_factor} drops among the "
                "tokens of one rank; give SwitchRouter router.capacity_factor, and leave it at None"
            )
        device = torch.cuda.current_device()
        self.register_buffer("step_dropped", torch.zeros(2, device=device), persistent=False)

    def forward(
        self, input: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states ``[S, B, H]`` -> probabilities, zero where dropped, and the map of what
        tokens asked for, ``[T, N]`` of this rank.

        Communicates as Megatron's router, and one all-gather of choices over ``tp`` and one
        over ``cp`` where sequences are cut.
        """
        probs, routing_map = super().forward(input, *args, **kwargs)
        if self.settings.capacity_factor is None:
            return probs, routing_map
        kept = self._kept(routing_map, input.shape[:2])
        if self.is_trained_now:
            counts = torch.stack([(routing_map & ~kept).sum(), routing_map.sum()])
            probs = run_in_backward(probs, lambda: self._record(counts))
        return probs * kept, routing_map

    def _kept(self, routing_map: torch.Tensor, places: torch.Size) -> torch.Tensor:
        """bool ``[T, N]`` of this rank: which pairs an expert has room for."""
        is_cut = self.config.sequence_parallel
        by_place = gathered_shards(routing_map.int().view(*places, -1), self.tp_group, is_cut)
        whole = gathered_in_order(by_place, self.cp_group)  # [S, B, N]
        flat = whole.flatten(0, 1)
        capacity = get_capacity(*flat.shape, self.settings.capacity_factor)
        kept = (flat > 0) & (flat.cumsum(dim=0) <= capacity)
        part = own_part(kept.view_as(whole), self.cp_group, 0)
        return own_shard(part, self.tp_group, is_cut).flatten(0, 1)

    def _record(self, counts: torch.Tensor) -> None:
        self.step_dropped += counts.to(self.step_dropped.dtype)

    def local_parts(self) -> list[torch.Tensor]:
        """Dropped tokens and tokens."""
        return [self.step_dropped]

    def scalars_of(self, parts: Iterator[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Share of tokens that passed the layer by."""
        dropped, tokens = next(parts).unbind()
        return {"dropped_tokens": dropped / tokens.clamp(min=1.0)}

    def clear_step(self) -> None:
        """Forget the counts."""
        self.step_dropped.zero_()
