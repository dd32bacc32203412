"""The two VQ losses (van den Oord et al. 2017, arXiv 1711.00937, eq. 3).

T tokens, H hidden size. Both are means over all T * H elements, as in the VQMoE release.
"""

from __future__ import annotations

import torch


def commitment_loss(x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Return the fp32 (fp64 for fp64) scalar mean |x - sg(v)|^2; its gradient reaches ``x`` only.

    Args:
        x: ``[T, H]``.
        quantized: ``[T, H]``, each token's code vector.
    """
    return _mean_square(x, quantized.detach())


def codebook_loss(x: torch.Tensor, quantized: torch.Tensor) -> torch.Tensor:
    """Return the scalar mean |sg(x) - v|^2; its gradient reaches the code vectors only.

    Args:
        x: ``[T, H]``.
        quantized: ``[T, H]``, each token's code vector, differentiable to the codebook.
    """
    return _mean_square(x.detach(), quantized)


def _mean_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return (a.to(dtype) - b.to(dtype)).square().mean()
