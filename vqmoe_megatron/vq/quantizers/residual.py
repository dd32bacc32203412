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

LEAST_REST = 1e-3  # of a token's length: shorter residuals start no codes
ROUNDING = 1e-6  # of a token's length: ten times what fp32 makes of equal vectors


class Residual(Codebook):
    """Codes ``[C, K, H]``; their statistics, revival and start are those of the residuals."""

    is_sliced = False

    @staticmethod
    def nearest(tokens: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Tokens ``[T, H]`` and ``[C, K, H]`` codes -> int64 ``[T, C]``, depth after depth."""
        left, found = _exact(tokens), []
        with torch.no_grad():
            for codes in vectors:
                found.append(nearest_code(left, codes))
                left = left - codes[found[-1]]
        return torch.stack(found, dim=1)

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Code ids ``[T, C]`` -> the sum of their vectors ``[T, H]``, differentiable."""
        vectors = self.code_vectors()
        return sum(codes.index_select(0, ids[:, c]) for c, codes in enumerate(vectors))

    def parts(self, prepared: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The residuals ``[T, C, H]`` in fp32 (fp64) that the codes ``ids`` quantise; codes get no
        gradient. What is left of a token that is its own code is zero, not the rounding of it,
        which would be offered to dead codes."""
        found = [_exact(prepared)]
        for depth, codes in enumerate(self.code_vectors().detach()[:-1]):
            found.append(found[-1] - codes.index_select(0, ids[:, depth]))
        left = torch.stack(found, dim=1)
        lengths = left.detach().norm(dim=2, keepdim=True)
        return left.masked_fill(lengths <= ROUNDING * lengths[:, :1], 0.0)

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
        """Set depth after depth from what is left of tokens ``[M, H]``; once.

        Tokens of which nothing is left, since they were made codes themselves, start no further
        ones: between several codes at zero rounding would choose.
        """
        tokens = left = sample.detach().float().cpu()
        build = kmeans_codes if self.vq.init == "kmeans" else data_codes
        depths = []
        for depth in range(self.num_slices):
            has_rest = left.norm(dim=1) > LEAST_REST * tokens.norm(dim=1)
            rests = left[has_rest] if has_rest.any() else left
            codes = build(rests.unsqueeze(1), self.num_codes, self.seed + depth)[0]
            left = left - codes[nearest_code(left, codes)]
            depths.append(codes)
        self.adopt(torch.stack(depths))


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
