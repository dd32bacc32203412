"""Codes of a vocabulary: weighted k-means over its embeddings, one round per optimizer step.

V entries, K codes, H width. Every entry weighs as often as its token was seen. A code that no seen
entry chose moves at once to an entry whose error (weight times squared distance to its code) is
among the largest, no two to the same one; so all codes are in use as long as K <= V and embeddings
differ. Pure functions of one rank's share of the vocabulary; the caller sums over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqmoe_megatron.vq.search import nearest_code
from vqmoe_megatron.vq.segment_sum import segment_sum


@dataclass(frozen=True)
class Round:
    """What one rank's entries say; ``sums`` are added over the ranks that hold the vocabulary."""

    sums: torch.Tensor  # fp32 [K, H + 1]: weighted sum of each code's entries, and their weight
    errors: torch.Tensor  # fp32 [V of this rank]


def assess(
    embeddings: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, codes: torch.Tensor
) -> Round:
    """Sum up this rank's entries under their present codes. No communication.

    Args:
        embeddings: fp32 ``[V, H]``.
        weights: fp32 ``[V]``, at least 0.
        ids: int64 ``[V]``.
        codes: fp32 ``[K, H]``.
    """
    weighed = torch.cat([embeddings, torch.ones_like(weights).unsqueeze(1)], dim=1)
    sums = segment_sum(weighed * weights.unsqueeze(1), ids, codes.shape[0])
    errors = weights * (embeddings - codes[ids]).square().sum(dim=1)
    return Round(sums, errors)


def replacements(weight_of_code: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """The entry that each code is to move to: int64 ``[K]``, -1 where it moves with its entries.

    Args:
        weight_of_code: fp32 ``[K]``, summed over ranks; 0 is a code without seen entries.
        errors: fp32 ``[V]`` of all ranks. Ties go to the lower entry.
    """
    is_idle = weight_of_code == 0
    order = torch.argsort(errors, descending=True, stable=True)
    place = is_idle.cumsum(dim=0) - 1
    chosen = order[place.clamp(min=0, max=order.numel() - 1)]
    is_worth_it = is_idle & (place < order.numel()) & (errors[chosen] > 0)
    return torch.where(is_worth_it, chosen, torch.full_like(chosen, -1))


def moved_codes(
    codes: torch.Tensor, sums: torch.Tensor, chosen: torch.Tensor, vectors: torch.Tensor
) -> torch.Tensor:
    """Codes ``[K, H]`` at their entries' mean, or at ``vectors [K, H]`` where one was chosen."""
    weight = sums[:, -1:]
    means = torch.where(weight > 0, sums[:, :-1] / weight.clamp(min=1e-30), codes)
    return torch.where((chosen >= 0).unsqueeze(1), vectors, means)


def own_vectors(embeddings: torch.Tensor, chosen: torch.Tensor, first: int) -> torch.Tensor:
    """Rows ``[K, H]`` of the chosen entries that this rank holds, from ``first`` on; else zero."""
    local = chosen - first
    is_own = (local >= 0) & (local < embeddings.shape[0])
    rows = embeddings[local.clamp(min=0, max=embeddings.shape[0] - 1)]
    return torch.where(is_own.unsqueeze(1), rows, torch.zeros_like(rows))


def assign(embeddings: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """int64 ``[V]``: the nearest code of each entry, ties to the lowest."""
    return nearest_code(embeddings, codes)
