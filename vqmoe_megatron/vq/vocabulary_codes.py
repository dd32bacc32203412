"""Codes of a vocabulary: weighted k-means over its embeddings, one round per optimizer step.

V entries, K codes, H width. Every entry weighs as often as its token was seen. A round:

1. A code moves to the weighted mean of its entries.
2. A code that no seen entry chose moves to an entry whose error (weight times squared distance to
   its code's new place) is among the largest, no two to the same one. An entry that stands at its
   code has none: with a second code there, rounding would say which of the two it has.
3. Every entry chooses the nearest code.

So all codes are in use as long as at least K seen entries differ; of fewer, each has its own.

Pure functions of one rank's share of the vocabulary; the caller sums over ranks.
"""

from __future__ import annotations

import torch

from vqmoe_megatron.vq.search import nearest_code
from vqmoe_megatron.vq.segment_sum import segment_sum

# An entry as near to its code as this share of its squared norm stands there, up to rounding.
SAME_PLACE = 1e-9


def sums_of_codes(
    embeddings: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, num_codes: int
) -> torch.Tensor:
    """Weighted sum of each code's entries, and their weight: fp32 ``[K, H + 1]``.

    Args:
        embeddings: fp32 ``[V, H]``.
        weights: fp32 ``[V]``, at least 0.
        ids: int64 ``[V]``, the entries' present codes.
        num_codes: K.
    """
    weighed = torch.cat([embeddings, torch.ones_like(weights).unsqueeze(1)], dim=1)
    return segment_sum(weighed * weights.unsqueeze(1), ids, num_codes)


def means_of_codes(codes: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Codes ``[K, H]`` at their entries' mean, by ``sums [K, H + 1]`` over all ranks; those without
    seen entries stay."""
    weight = sums[:, -1:]
    return torch.where(weight > 0, sums[:, :-1] / weight.clamp(min=1e-30), codes)


def errors_of_entries(
    embeddings: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, means: torch.Tensor
) -> torch.Tensor:
    """Weight times squared distance to the code's mean: fp32 ``[V]``, 0 at the same place."""
    squared = (embeddings - means[ids]).square().sum(dim=1)
    is_apart = squared > SAME_PLACE * embeddings.square().sum(dim=1)
    return torch.where(is_apart, weights * squared, torch.zeros_like(squared))


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


def moved_codes(means: torch.Tensor, chosen: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Codes ``[K, H]``: their means, or ``vectors [K, H]`` where an entry was chosen."""
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
