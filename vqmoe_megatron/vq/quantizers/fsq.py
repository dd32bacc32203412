"""fsq: each of a few projected numbers is rounded to a few levels (arXiv 2309.15505).

T tokens, H hidden size, D = ``vq.code_dim``, L_i = ``vq.fsq_levels``, K = product of L_i.

    z = tanh(P x)                      in (-1, 1), P the projection of low_dim
    v_i = 2 round(...) / (L_i - 1) - 1 the nearest of L_i levels evenly spread over [-1, 1]

The codes are all points of that grid, numbered with the last dimension running fastest; they never
move. To round is to find the nearest of them, at D operations a token in place of D K. With an even
L_i levels lie symmetric around zero, where the paper shifts them by half a level.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vqmoe_megatron.vq.quantizers.low_dim import LowDim


class Fsq(LowDim):
    """A token learns through ``straight_through``, and its commitment loss; the grid is fixed."""

    search_is_nearest = True

    @staticmethod
    def into_space(x: torch.Tensor, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, H]`` -> fp32 (fp64) ``[T, D]`` in (-1, 1)."""
        return LowDim.into_space(x, constants).tanh()

    def draw_codes(self, seed: int) -> torch.Tensor:
        """The grid ``[1, K, D]``; nothing of it is random."""
        levels = [torch.linspace(-1.0, 1.0, count) for count in self.vq.fsq_levels]
        return torch.cartesian_prod(*levels).view(1, self.num_codes, self.width)

    def search(self, prepared: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` -> code ids int64 ``[T, 1]``; a tie goes to the lower level, and so does NaN:
        of a broken step the loss is to be seen, and ``train.nan_policy`` followed."""
        ids = torch.zeros_like(prepared[:, 0], dtype=torch.int64)
        for i, count in enumerate(self.vq.fsq_levels):
            place = (prepared.detach()[:, i].nan_to_num(-1.0) + 1.0) * ((count - 1) / 2)
            ids = ids * count + (place - 0.5).ceil().clamp(0, count - 1).long()
        return ids.unsqueeze(1)
