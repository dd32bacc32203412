"""lfq: the code is the signs of a few projected numbers; no codebook is looked up (2310.05737).

T tokens, H hidden size, D = ``vq.code_dim``, K = 2^D. z = P x with the projection of low_dim;
v = sign(z), so the codes are the corners of a cube, and the sign is the nearest of them.

Entropy loss (arXiv 2310.05737, eq. 6): tokens shall be sure of their code, and all codes be used.
A token takes bit i with p_i = sigmoid(4 z_i), the share of exp(-|z - v|^2) among both signs; bits
are independent of each other, so the entropy of its code is the sum of theirs:

    loss = entropy_loss_coeff * mean over tokens and bits of [ H(p_i) - H(q_i, p_i) ]

where H(q, p) = -p log q - (1 - p) log(1 - q) and q_i is the moving share of tokens whose bit i is
set, which statistics of whole steps give. Its gradient is that of H(p_i) - H(mean p_i), with the
mean over recent steps in place of a microbatch's, which would depend on how a batch is cut.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.vq.codebook_update import CodebookState, StepStatistics, update_usage
from vqmoe_megatron.vq.quantizers.low_dim import LowDim

LEAST_SHARE = 1e-4  # of a bit's value: below it the pull grows no further


class Lfq(LowDim):
    """A token learns through ``straight_through``, commitment and entropy; the corners are
    fixed."""

    search_is_nearest = True

    def draw_codes(self, seed: int) -> torch.Tensor:
        """The corners ``[1, K, D]`` in {-1, 1}; nothing of them is random."""
        return self._bits().float().mul_(2.0).sub_(1.0).unsqueeze(0)

    def _bits(self) -> torch.Tensor:
        """Bits of all numbers, int64 ``[K, D]``, the last one running fastest."""
        numbers = torch.arange(self.num_codes).unsqueeze(1)
        return numbers >> torch.arange(self.width - 1, -1, -1) & 1

    def search(self, prepared: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` -> code ids int64 ``[T, 1]``; a zero goes to the lower number."""
        ids = torch.zeros_like(prepared[:, 0], dtype=torch.int64)
        for i in range(self.width):
            ids = 2 * ids + (prepared[:, i] > 0).long()
        return ids.unsqueeze(1)

    def extra_loss(self, prepared: torch.Tensor) -> torch.Tensor | None:
        """The entropy loss of ``[T, D]``, a scalar; None where its coefficient is 0."""
        if self.vq.entropy_loss_coeff == 0:
            return None
        share = self.usage[0] @ (self.codes[0] > 0).to(self.usage.dtype)  # [D]
        share = share.clamp(LEAST_SHARE, 1.0 - LEAST_SHARE)
        logits = 4.0 * prepared
        p = logits.sigmoid()
        # H(p) = softplus(a) - a p for logits a
        entropy = torch.nn.functional.softplus(logits) - logits * p
        cross = -p * share.log() - (1.0 - p) * (1.0 - share).log()
        return self.vq.entropy_loss_coeff * (entropy - cross).mean()

    @torch.no_grad()
    def apply_step(self, statistics: StepStatistics) -> dict[str, torch.Tensor]:
        """As :meth:`Codebook.apply_step`; the usage moves although the codes do not."""
        moves = self._finite(statistics) & (statistics.count > 0).any()
        state = CodebookState(self.codes.data, self.usage, None)
        moved = update_usage(state, statistics.count, self.vq.ema_decay).usage
        self.usage.copy_(torch.where(moves, moved, self.usage))
        return super().apply_step(statistics)
