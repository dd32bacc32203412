"""Which tokens a rank offers to replace dead codes."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from vqmoe_megatron.moe.candidates import Candidates


def group(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def places(
    num_candidates: int,
    num_local_tokens: int,
    rank: int,
    num_shards: int,
    num_ranks: int,
    number: int = 0,
    varies: bool = False,
    num_parts: int = 1,
) -> dict[int, int]:
    """Slot -> position in the shard, of one rank's microbatch; ``num_parts`` context-parallel."""
    groups = SimpleNamespace(
        tp=group(rank % num_shards, num_shards),
        cp=group(rank // num_shards % num_parts, num_parts),
        tp_dp_cp=group(rank, num_ranks),
    )
    offers = Candidates(num_candidates, groups, varies)
    found = offers.places(num_local_tokens, number, torch.device("cpu"))
    if found is None:
        return {}
    slots, positions = (part.tolist() for part in found)
    return dict(zip(slots, positions, strict=True))


@pytest.mark.parametrize(
    ("num_candidates", "num_shards"), list(product((1, 3, 8, 96), (1, 2, 3, 4)))
)
@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_the_table_is_filled_by_microbatches_in_the_order_of_the_global_batch(
    num_candidates: int, num_shards: int, num_replicas: int
) -> None:
    for num_local_tokens, num_microbatches in product((1, 2, 5, 64), (1, 3)):
        num_tokens = num_local_tokens * num_shards
        wanted = {}  # slot -> microbatch of the global batch, shard, position
        for g in range(num_microbatches * num_replicas):
            num_offered = min(num_tokens, num_candidates - g * num_tokens)
            for j in range(num_offered):
                shard, local = divmod(j * num_tokens // num_offered, num_local_tokens)
                wanted[g * num_tokens + j] = (g, shard, local)
        found = {}
        for rank, number in product(range(num_shards * num_replicas), range(num_microbatches)):
            own = places(
                num_candidates,
                num_local_tokens,
                rank,
                num_shards,
                num_shards * num_replicas,
                number,
            )
            g = number * num_replicas + rank // num_shards
            assert not found.keys() & own.keys()  # tables are added up
            found |= {slot: (g, rank % num_shards, local) for slot, local in own.items()}
        assert found == wanted
        assert len(set(found.values())) == len(found)  # no token twice


def test_where_lengths_vary_only_the_first_microbatch_offers() -> None:
    assert len(places(9, 4, 0, 1, 2, varies=True)) == 4
    assert places(9, 4, 0, 1, 2, number=1, varies=True) == {}
    assert places(9, 4, 1, 1, 2, varies=True) == {}


@pytest.mark.parametrize(("num_shards", "num_parts"), [(1, 2), (2, 2), (3, 2), (1, 3), (4, 4)])
@pytest.mark.parametrize("num_candidates", [1, 7, 30, 96])
def test_cut_sequences_offer_the_tokens_of_whole_ones(
    num_candidates: int, num_shards: int, num_parts: int
) -> None:
    """A table of token numbers, whatever the cut: that of one rank."""
    num_tokens, num_replicas = 48, 2
    chunks = torch.arange(num_tokens).chunk(2 * num_parts)
    ranks_of_replica = num_shards * num_parts
    found: dict[int, tuple[int, int]] = {}  # slot -> microbatch, token
    for rank in range(ranks_of_replica * num_replicas):
        part = rank // num_shards % num_parts
        held = torch.cat([chunks[part], chunks[-1 - part]]).chunk(num_shards)[rank % num_shards]
        own = places(
            num_candidates,
            len(held),
            rank,
            num_shards,
            ranks_of_replica * num_replicas,
            num_parts=num_parts,
        )
        assert not found.keys() & own.keys()
        found |= {slot: (rank // ranks_of_replica, int(held[place])) for slot, place in own.items()}
    wanted = {
        slot: (number, place)
        for number in range(num_replicas)
        for slot, place in places(num_candidates, num_tokens, number, 1, num_replicas).items()
    }
    assert found == wanted
