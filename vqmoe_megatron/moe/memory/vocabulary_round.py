"""One round of the vocabulary's k-means, its embeddings cut over tensor-parallel ranks.

V entries, W of them on this rank, K codes, H width. The rules are those of ``vq/vocabulary_codes``.

Data-parallel replicas sum in tensor-parallel groups of their own: that they find the same bits
rests on all-reduces that add in the same order in each. Of two ranks every order is the same; for
more, ``train.check_replicas_interval`` would tell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqmoe_megatron.moe.memory.rank_shares import gathered
from vqmoe_megatron.vq import vocabulary_codes


@dataclass(frozen=True)
class Entries:
    """This rank's part of the vocabulary."""

    embeddings: torch.Tensor  # fp32 [W, H]
    weights: torch.Tensor  # fp32 [W], how often each is seen
    ids: torch.Tensor  # int64 [W], their codes so far
    first: int  # number of the first one in the whole vocabulary


def moved_codes(
    mine: Entries,
    codes: torch.Tensor,
    is_first: torch.Tensor,
    tp: torch.distributed.ProcessGroup,
) -> torch.Tensor:
    """The codes fp32 ``[K, H]`` that a round makes of ``codes``, equal on all ranks.

    Args:
        mine: entries of this rank.
        codes: fp32 ``[K, H]``.
        is_first: bool scalar: nothing is known but how often entries were seen in one step; the
            most frequent ones become the codes.
        tp: the ranks that hold the vocabulary.

    Communicates over ``tp``: all-reduces of ``[K, H + 1]`` and ``[K, H]``, an all-gather of
    ``[V]``.
    """
    sums = vocabulary_codes.sums_of_codes(mine.embeddings, mine.weights, mine.ids, codes.shape[0])
    torch.distributed.all_reduce(sums, group=tp)
    sums = torch.where(is_first, torch.zeros_like(sums), sums)
    means = vocabulary_codes.means_of_codes(codes, sums)
    errors = vocabulary_codes.errors_of_entries(mine.embeddings, mine.weights, mine.ids, means)
    errors = gathered(torch.where(is_first, mine.weights, errors), tp)
    chosen = vocabulary_codes.replacements(sums[:, -1], errors)
    vectors = vocabulary_codes.own_vectors(mine.embeddings, chosen, mine.first)
    torch.distributed.all_reduce(vectors, group=tp)
    return vocabulary_codes.moved_codes(means, chosen, vectors)
