"""What relative positions need beside attention itself: the vectors of distances, and the shift.

S queries, L >= S keys: the last S keys are those of the queries, the others of text before them.
Query i stands behind key j by the distance L - S + i - j. H hidden size.
"""

from __future__ import annotations

import torch

BASE = 10000.0  # of the sinusoids in "Attention Is All You Need", which Transformer-XL keeps


def distance_vectors(num_keys: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return ``[L, H]`` in the dtype and on the device of ``like``; row c is of L - 1 - c.

    The first half are sines, the second cosines, as in Transformer-XL. Angles are taken in fp64,
    since fp32 has no digit left of the fastest ones at long distances.
    """
    numbers = torch.arange(num_keys - 1, -1, -1, dtype=torch.float64, device=like.device)
    halves = torch.arange(0, width, 2, dtype=torch.float64, device=like.device)
    angles = numbers[:, None] * BASE ** (-halves / width)
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(like.dtype)


def by_key(scores: torch.Tensor) -> torch.Tensor:
    """Turn scores by distance ``[..., S, L]`` into scores by key: column c of query i goes to key
    c - (S - 1) + i. Keys behind their query get what is masked anyway.

    A column of zeros in front and another division into rows do it without an index:

        S = 2, L = 3, distances 2 1 0    a b c  ->  0 a b c  ->  0 a  ->  b c 0
                                         d e f      0 d e f      b c      d e f
                                                                 0 d
                                                                 e f
    """
    *outer, num_queries, num_keys = scores.shape
    padded = torch.nn.functional.pad(scores, (1, 0))
    padded = padded.reshape(*outer, num_keys + 1, num_queries)
    return padded[..., 1:, :].reshape(scores.shape)
