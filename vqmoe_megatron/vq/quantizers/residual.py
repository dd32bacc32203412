"""residual: C codebooks one after the other, each on what those before it have left.

T tokens, H hidden size, C depths, K codes per depth. r_0 = x; at depth c the code is the nearest
v_c to r_c, and r_{c+1} = r_c - v_c: the token's quantised vector is the sum of its C codes. Each
code's expert sees that code's vector, of full width.

The losses are the sums over depths of mean |sg(r_c) - v_c|^2 and mean |r_c - sg(v_c)|^2, where r_c
passes its gradient to the token and not to earlier codes (as in arXiv 2203.01941, eq. 7).
"""

from __future__ import annotations

import torch

from vqmoe_megatron.vq.codebook import Codebook
from vqmoe_megatron.vq.codebook_init import data_codes, kmeans_codes
from vqmoe_megatron.vq.losses import quantization_losses
from vqmoe_megatron.vq.search import nearest_code


class Residual(Codebook):
    """Codes ``[C, K, H]``; their statistics, revival and start are those of the residuals."""

    is_sliced = False

    def search(self, prepared: torch.Tensor) -> torch.Tensor:
        """Tokens ``[T, H]`` -> code ids int64 ``[T, C]``, depth after depth; no gradient."""
        return self._walk(prepared.detach())[0]

    def _walk(
        self, x: torch.Tensor, ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The nearest codes, or ``ids``, int64 ``[T, C]``, and C residuals ``[T, H]`` in fp32
        (fp64)."""
        left, found, chosen = x if x.dtype == torch.float64 else x.float(), [], []
        for depth, codes in enumerate(self.code_vectors().detach().unbind()):
            of_depth = nearest_code(left.detach(), codes) if ids is None else ids[:, depth]
            chosen.append(of_depth)
            found.append(left)
            left = left - codes.index_select(0, of_depth)
        return torch.stack(chosen, dim=1), found

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Code ids ``[T, C]`` -> the sum of their vectors ``[T, H]``, differentiable."""
        vectors = self.code_vectors()
        return sum(codes.index_select(0, ids[:, c]) for c, codes in enumerate(vectors))

    def parts(self, prepared: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The residuals ``[T, C, H]`` that the codes ``ids`` quantise."""
        return torch.stack(self._walk(prepared, ids)[1], dim=1)

    def search_parts(self, parts: torch.Tensor) -> torch.Tensor:
        """Residuals ``[M, C, H]`` -> at each depth the nearest code, int64 ``[M, C]``."""
        return nearest_code(parts.detach().flatten(1), self.code_vectors().detach())

    def losses(
        self, prepared: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed over depths."""
        residuals = self.parts(prepared, ids).flatten(1)
        commitment, codebook = quantization_losses(residuals, vectors, ids)  # means over depths too
        return self.num_slices * commitment, self.num_slices * codebook

    @torch.no_grad()
    def initialize_from(self, sample: torch.Tensor) -> None:
        """Set depth after depth from what is left of tokens ``[M, H]``; once."""
        left = sample.detach().float().cpu()
        build = kmeans_codes if self.vq.init == "kmeans" else data_codes
        depths = []
        for depth in range(self.num_slices):
            codes = build(left.unsqueeze(1), self.num_codes, self.seed + depth)[0]
            left = left - codes[nearest_code(left, codes)]
            depths.append(codes)
        self.adopt(torch.stack(depths))
