"""Causal attention of sequences that are cut over context-parallel ranks, by gathering the keys.

P context-parallel ranks, s = S / P positions of this one in two chunks of L = s / 2
(``context_cut``), b sequences, A heads, G groups of keys and values, d columns of a head.

1. Keys and values of all ranks are gathered in one call; backwards their gradients are summed and
   scattered in one.
2. Each chunk attends to the keys up to its own end, and not to those behind each of its positions:
   chunks r and 2 P - 1 - r together cost as much as any other rank's.

A ring would hold one rank's keys at a time; this holds all of them, S b G 2 d elements of a layer
until its backward pass, and is plain torch.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from vqmoe_megatron.moe.context_cut import chunks_of, in_order


def attend_to_whole_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    cp: torch.distributed.ProcessGroup,
) -> torch.Tensor:
    """Return ``[s, b, A d]`` for queries ``[s, b, A, d]``, keys and values ``[s, b, G, d]``.

    Communicates over ``cp``: one all-gather of ``[s, b, G, 2 d]``; backwards one reduce-scatter of
    as much.
    """
    both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=3), group=cp)
    whole = in_order(both.chunk(cp.size()), 0)  # [S, b, G, 2 d]
    keys, values = whole.permute(1, 2, 0, 3).split([key.shape[3], value.shape[3]], dim=3)
    queries = query.permute(1, 2, 0, 3).chunk(2, dim=2)  # [b, A, L, d] each
    outputs = [
        _of_chunk(chunk, keys, values, number, scale)
        for chunk, number in zip(queries, chunks_of(cp.rank(), cp.size()), strict=True)
    ]
    return torch.cat(outputs, dim=2).permute(2, 0, 1, 3).flatten(2).contiguous()


def _of_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, number: int, scale: float
) -> torch.Tensor:
    """``[b, A, L, d]`` of a chunk's queries, which see the keys ``[b, G, S, d]`` up to their
    own."""
    length = query.shape[2]
    end = (number + 1) * length
    is_seen = torch.ones(length, end, dtype=torch.bool, device=query.device)
    return torch.nn.functional.scaled_dot_product_attention(
        query,
        keys[:, :, :end],
        values[:, :, :end],
        attn_mask=is_seen.tril(end - length),
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
