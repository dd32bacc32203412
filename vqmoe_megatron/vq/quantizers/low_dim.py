"""low_dim: the nearest code behind a random projection.

T tokens, H hidden size, D = ``vq.code_dim``. Fixed random projections keep distances, cannot
collapse, and cost D / H of the search (as in arXiv 2202.01855). With ``vq.train_projection`` its
rows turn, at length one: they follow what tokens get through it, by straight_through and the
commitment loss. Codes are lifted by its transpose, which passes no gradient on.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from vqmoe_megatron.vq.codebook import Codebook
from vqmoe_megatron.vq.codebook_init import orthonormal_rows


class LowDim(Codebook):
    """Codes lie in D dimensions; a hidden vector is the shortest whose projection it is, P^T v."""

    is_projected = True

    projection: torch.Tensor  # fp32 [D, H]; fixed with orthonormal rows, or trained

    @staticmethod
    def constant_shapes(width: int, hidden_size: int) -> dict[str, list[int]]:
        """The projection."""
        return {"projection": [width, hidden_size]}

    def draw_constants(self, seed: int) -> dict[str, torch.Tensor]:
        """Drawn uniformly among those with orthonormal rows."""
        return {"projection": orthonormal_rows(self.width, self.hidden_size, seed)}

    @property
    def space(self) -> dict[str, torch.Tensor]:
        """The projection, of a trained one its rows at length one."""
        if not self.vq.train_projection:
            return super().space
        return {"projection": torch.nn.functional.normalize(self.projection, dim=1)}

    @staticmethod
    def into_space(x: torch.Tensor, constants: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """``[T, H]`` -> fp32 (fp64) ``[T, D]``."""
        projection = constants["projection"]
        return x.to(projection.dtype) @ projection.t()

    def lift(self, vectors: torch.Tensor) -> torch.Tensor:
        """``[..., D]`` -> ``[..., H]``."""
        projection = self.space["projection"].detach()
        return vectors.to(projection.dtype) @ projection

    def lower(self, grads: torch.Tensor) -> torch.Tensor:
        """``[..., H]`` -> ``[..., D]``."""
        projection = self.space["projection"].detach()
        return grads.to(projection.dtype) @ projection.t()
