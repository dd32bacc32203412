"""cosine: the code of the nearest direction."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vqmoe_megatron.vq.codebook import Codebook


class Cosine(Codebook):
    """Tokens and codes scaled to the same length (as in arXiv 2110.04627).

    That length is sqrt(H), so that elements stay of order one.
    """

    @staticmethod
    def into_space(x: torch.Tensor, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, H]`` -> ``[T, H]`` of length sqrt(H)."""
        return torch.nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5

    def code_vectors(self) -> torch.Tensor:
        """``[C, K, D]`` of length sqrt(D)."""
        return torch.nn.functional.normalize(self.codes, dim=-1) * self.width**0.5
