"""Megatron's learned router, its balance loss weighing the same at every tensor-parallel size.

With ``calculate_per_token_loss`` every loss is summed over tokens and divided by their number at
the end. Megatron 0.16.1 scales the balance loss, a mean, by the tokens that this rank sees. Under
sequence parallelism that is one shard, and the loss would weigh 1 / TP of what it should.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter


class BalancedRouter(TopKRouter):
    """``TopKRouter`` whose balance loss counts the tokens of all sequence shards."""

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        *args: Any,
        valid_token_count: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attach the loss to ``activation`` ``[T, N]``, T being the tokens of this shard.

        ``valid_token_count`` is of this shard too. No communication.
        """
        if self.config.sequence_parallel:
            num_tokens = activation.shape[0] if valid_token_count is None else valid_token_count
            valid_token_count = num_tokens * self.config.tensor_model_parallel_size
        return super().attach_and_log_load_balancing_loss(
            activation, *args, valid_token_count=valid_token_count, **kwargs
        )
