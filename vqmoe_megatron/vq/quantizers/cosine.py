"""cosine: the code of the nearest direction."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.codebook import Codebook


class Cosine(Codebook):
    """Tokens and codes scaled to the same length (as in arXiv 2110.04627).

    That length is sqrt(H), so that elements stay of order one. With ``vq.learn_code_scale`` the
    codes' length is that times a number which follows the codebook loss: the nearest of codes of
    one length does not depend on it, but how well they stand for their tokens does (for tokens at a
    mean cosine s to their codes, s is best).
    """

    def __init__(self, vq: VQConfig, hidden_size: int, seed: int) -> None:
        super().__init__(vq, hidden_size, seed)
        self.register_parameter("scale", None)
        if vq.learn_code_scale:
            # Megatron gives vectors, and so a single number, no weight decay: another group.
            self.scale = torch.nn.Parameter(torch.ones(1, 1), requires_grad=vq.trains_scale)

    @staticmethod
    def into_space(x: torch.Tensor, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, H]`` -> ``[T, H]`` of length sqrt(H)."""
        return torch.nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5

    def code_vectors(self) -> torch.Tensor:
        """``[C, K, D]`` of length sqrt(D), times the learned scale."""
        vectors = torch.nn.functional.normalize(self.codes, dim=-1) * self.width**0.5
        return vectors if self.scale is None else vectors * self.scale
