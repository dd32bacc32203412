"""A sequence cut over context-parallel ranks, as Megatron cuts it: two chunks for every rank.

S positions, P context-parallel ranks, chunks of L = S / (2 P) positions. Rank r holds the chunks r
and 2 P - 1 - r, in this order, so that under a causal mask all ranks have as much to attend to:

    P 2, S 8    rank 0: 0 1 6 7    rank 1: 2 3 4 5

Under sequence parallelism the tensor-parallel ranks then take equal parts of what their
context-parallel rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Numbers of the two chunks, of 2 P, that a rank of P holds."""
    return rank, 2 * size - 1 - rank


def own_part(whole: torch.Tensor, cp: torch.distributed.ProcessGroup, dim: int) -> torch.Tensor:
    """This rank's S / P positions along ``dim`` of whole sequences. No communication."""
    if cp.size() == 1:
        return whole
    chunks = whole.chunk(2 * cp.size(), dim)
    return torch.cat([chunks[number] for number in chunks_of(cp.rank(), cp.size())], dim)


def in_order(parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
    """The parts of all ranks, in their order, put together to whole sequences along ``dim``."""
    if len(parts) == 1:
        return parts[0]
    firsts, seconds = zip(*(part.chunk(2, dim) for part in parts), strict=True)
    return torch.cat([*firsts, *reversed(seconds)], dim)


def gathered_in_order(own: torch.Tensor, cp: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Whole sequences ``[S, ...]`` of every rank's part ``[S / P, ...]``, without gradients.

    Communicates: one all-gather over ``cp``.
    """
    if cp.size() == 1:
        return own
    parts = own.new_empty(cp.size() * own.shape[0], *own.shape[1:])
    torch.distributed.all_gather_into_tensor(parts, own.contiguous(), group=cp)
    return in_order(parts.chunk(cp.size()), 0)


@dataclass(frozen=True)
class Span:
    """Successive positions of whole sequences that a rank holds."""

    first: int  # of the whole sequence
    length: int
    place: int  # of the first one, among those of the rank


def own_spans(
    num_local: int,
    tp: torch.distributed.ProcessGroup,
    cp: torch.distributed.ProcessGroup,
) -> list[Span]:
    """Where the ``num_local`` positions of this rank, sequence-parallel over ``tp``, lie.

    One span without context parallelism, else two at most; empty ones are left out. Positions may
    be counted in tokens ``S b`` as well, those of one place being neighbours.
    """
    first = tp.rank() * num_local  # among those of the context-parallel rank
    if cp.size() == 1:
        return [Span(first, num_local, 0)]
    length = tp.size() * num_local // 2  # L
    spans = []
    for half, number in enumerate(chunks_of(cp.rank(), cp.size())):
        begin, end = max(first, half * length), min(first + num_local, (half + 1) * length)
        if begin < end:
            spans.append(Span(number * length + begin - half * length, end - begin, begin - first))
    return spans


def own_shard(part: torch.Tensor, tp: torch.distributed.ProcessGroup, is_cut: bool) -> torch.Tensor:
    """This rank's ``[S / (P TP), ...]`` of what its context-parallel rank holds, ``[S / P, ...]``.

    ``is_cut``: sequence parallelism. No communication.
    """
    return part.chunk(tp.size(), dim=0)[tp.rank()] if is_cut else part


def gathered_shards(
    shard: torch.Tensor, tp: torch.distributed.ProcessGroup, is_cut: bool
) -> torch.Tensor:
    """What the context-parallel rank holds of this rank's shard, without gradients; undoes
    :func:`own_shard`.

    Communicates: one all-gather over ``tp``, where sequences are cut over several ranks.
    """
    if not is_cut or tp.size() == 1:
        return shard
    part = shard.new_empty(tp.size() * shard.shape[0], *shard.shape[1:])
    torch.distributed.all_gather_into_tensor(part, shard.contiguous(), group=tp)
    return part
