"""Causal decayed means of a token's embeddings, within its document.

    c_t = (1 - decay) * sum over j >= 0 of decay^j e_{t-j}

Summed by doubling: after step i every token holds its last 2^i terms, so the mean costs a few
whole-tensor operations. Terms that weigh less than ``LEAST_WEIGHT`` are left out.
"""

from __future__ import annotations

import math

import torch

LEAST_WEIGHT = 1e-4


def num_doublings(decay: float) -> int:
    """How many steps cover all terms of at least ``LEAST_WEIGHT``."""
    if decay <= LEAST_WEIGHT:
        return 0
    return math.ceil(math.log2(math.log(LEAST_WEIGHT) / math.log(decay) + 1))


def context_means(vectors: torch.Tensor, before: torch.Tensor, decay: float) -> torch.Tensor:
    """``[b, S, D]`` vectors -> their means ``[b, S, D]``. No communication.

    Args:
        vectors: floating.
        before: int64 ``[b, S]``, tokens of the document before each.
        decay: in ``[0, 1)``.
    """
    means = vectors * (1.0 - decay)
    for step in range(num_doublings(decay)):
        distance = 2**step
        earlier = torch.nn.functional.pad(means, (0, 0, distance, 0))[:, : means.shape[1]]
        inside = (before >= distance).unsqueeze(-1)
        means = means + torch.where(inside, earlier, torch.zeros_like(earlier)) * decay**distance
    return means
