"""Megatron's learned router, its balance losses weighing the same at every layout.

Megatron has two faults here:

- With ``calculate_per_token_loss`` every loss is summed over tokens and divided by their number at
  the end, so a balance loss, a mean, has to be scaled by the tokens it stands for. Megatron before
  0.19 takes those of one sequence shard (1 / TP of them), and for ``seq_aux_loss`` those of one
  sequence.
- ``global_aux_loss`` is a mean over all data-parallel ranks already, and the average of gradients
  over them divides it once more.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter

from vqmoe_megatron.runtime.versions import balance_loss_factor, is_over_data_ranks


class BalancedRouter(TopKRouter):
    """``TopKRouter`` with balance losses that do not depend on TP, DP or the microbatch size."""

    def attach_and_log_load_balancing_loss(
        self,
        activation: torch.Tensor,
        aux_loss_coeff: float,
        aux_loss: torch.Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        *,
        valid_token_count: int | torch.Tensor | None = None,
        **scope: bool,
    ) -> torch.Tensor:
        """Attach ``aux_loss`` to ``activation`` ``[T, N]``, T being the tokens of this shard.

        Without a padding mask, which the layer refuses, all tokens are valid and
        ``valid_token_count`` is not needed. What is logged stays as it was. No communication.

        Args:
            activation, aux_loss_coeff, aux_loss, aux_loss_name, reduce_group: as Megatron has them.
            valid_token_count: not used.
            scope: Megatron's word, in its release, for a loss over data-parallel ranks.
        """
        num_tokens = activation.shape[0]
        if self.config.sequence_parallel:
            num_tokens *= self.config.tensor_model_parallel_size
        num_averaged = 1
        if is_over_data_ranks(scope):
            num_averaged = reduce_group.size() // self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(
            activation,
            aux_loss_coeff * num_averaged,  # logged is the ratio of the two
            aux_loss * num_averaged,
            aux_loss_name,
            reduce_group,
            valid_token_count=num_tokens // balance_loss_factor(self.tp_cp_group.size()),
            **scope,
        )
