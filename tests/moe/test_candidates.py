"""Which tokens a rank offers to replace dead codes."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch

from vqmoe_megatron.moe.candidates import Candidates


def places(
    num_candidates: int,
    num_local_tokens: int,
    rank: int,
    num_shards: int,
    num_ranks: int,
    number: int = 0,
    varies: bool = False,
) -> dict[int, int]:
    """Slot -> position in the shard, of one rank's microbatch."""
    shard = SimpleNamespace(rank=lambda: rank % num_shards, size=lambda: num_shards)
    replicas = SimpleNamespace(rank=lambda: rank, size=lambda: num_ranks)
    groups = SimpleNamespace(tp=shard, tp_dp_cp=replicas)
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
