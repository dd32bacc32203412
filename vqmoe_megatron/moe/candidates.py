"""Tokens that a step offers to replace dead codes: the same ones however sequences are cut.

M candidates, T local tokens, P ranks that hold shards of one sequence. Candidate j is the token at
position j * T P // M of the full sequence order. They come from the first data-parallel rank, whose
first microbatch holds the same samples at every data-parallel size.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection


def offers_candidates(pg_collection: ProcessGroupCollection) -> bool:
    """Whether this rank belongs to the first data-parallel rank."""
    return pg_collection.tp_dp_cp.rank() < pg_collection.tp.size()


def candidate_places(
    num_candidates: int,
    num_local_tokens: int,
    shards: torch.distributed.ProcessGroup,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of the candidate table that this rank fills, and its token positions, int64 each.

    Shard r of P holds the positions from r T on, so the j from r M / P, rounded up, on.
    """
    rank, num_shards = shards.rank(), shards.size()
    first, end = (-(-shard * num_candidates // num_shards) for shard in (rank, rank + 1))
    slots = torch.arange(first, end, device=device)
    positions = slots * (num_local_tokens * num_shards) // num_candidates
    return slots, positions - rank * num_local_tokens


def candidate_table(
    found: torch.Tensor | None, slots: torch.Tensor | None, like: torch.Tensor, *shape: int
) -> torch.Tensor:
    """``[M, C, D]`` of dtype and device of ``like``, filled in this rank's slots with what was
    ``found`` for them (None: nothing); the sum over ranks is the table."""
    if found is not None and slots is not None and slots.numel() == shape[0]:
        return found
    table = like.new_zeros(shape)
    if found is not None:
        table[slots] = found
    return table
