"""Megatron's learned router, its balance losses weighing the same at every layout.

Megatron has two faults here:

- With ``calculate_per_token_loss`` every loss is summed over tokens and divided by their number at
  the end, so a balance loss, a mean, has to be scaled by the tokens it stands for. Megatron before
  0.19 takes those of one rank (1 / (TP CP) of them), and for ``seq_aux_loss`` those of one
  sequence.
- ``global_aux_loss`` is a mean over all data-parallel ranks already, and the average of gradients
  over them divides it once more.

With ``choose`` the router serves ``vq.path=filled``: it returns its probabilities of all experts,
and the experts are chosen by the path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from vqmoe_megatron.runtime.versions import balance_loss_factor, is_over_data_ranks


class BalancedRouter(TopKRouter):
    """``TopKRouter``, its balance losses the same at every TP, CP, DP and microbatch size."""

    def forward(
        self,
        input: torch.Tensor,
        *args: Any,
        choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As Megatron's, or with ``choose`` the probabilities of all experts.

        Args:
            input: ``[S, B, H]``; T = S B.
            choose: from probabilities ``[T, N]``, without gradient, to the chosen pairs, bool
                ``[T, N]``, any number per token. The balance losses are Megatron's with these in
                the place of its top-k, N * sum of f_i P_i with f_i = pairs of expert i / (T k).
            args, kwargs: Megatron's, without ``choose``.

        Returns:
            Probabilities and routing map ``[T, N]``; with ``choose`` the softmax over all N logits
            in fp32 (fp64 for fp64 logits) and the chosen pairs. Communicates as Megatron does, for
            the balance losses.
        """
        if choose is None:
            return super().forward(input, *args, **kwargs)
        logits = self.gating(input)
        sequence_shape = logits.shape[:2]
        logits = self.apply_z_loss(logits.flatten(0, 1))
        dtype = logits.dtype if logits.dtype == torch.float64 else torch.float32
        probs = scores = torch.softmax(logits, dim=-1, dtype=dtype)
        chosen = choose(probs.detach())
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            probs = self._apply_aux_loss(probs, scores, chosen)
            probs = self._apply_seq_aux_loss(probs, scores, chosen, *sequence_shape)
            probs = self._apply_global_aux_loss(probs, scores, chosen)
        return probs, chosen

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
        """Attach ``aux_loss`` to ``activation`` ``[T, N]``, T being the tokens of this rank.

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
        num_tokens *= self.config.context_parallel_size
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
