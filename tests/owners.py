"""Who owns an expert and, under the ``mod`` map, a code: written out once more, for comparison."""

from __future__ import annotations


def owner_rank(expert: int, num_experts: int, num_ranks: int) -> int:
    """The expert-parallel rank of an expert: N experts in contiguous blocks on P ranks."""
    return expert // (num_experts // num_ranks)


def owner_of_code(code: int, num_experts: int, num_ranks: int) -> int:
    """The expert-parallel rank that owns the expert of code row ``code``."""
    return owner_rank(code % num_experts, num_experts, num_ranks)
