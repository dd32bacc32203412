"""Counting bytes, on real ranks: every collective by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

pytestmark = pytest.mark.distributed

WORLD = 3


def collectives() -> dict:
    """In a rank: one of each; what was counted, and whether results came through."""
    from megatron.core.tensor_parallel import mappings

    from vqmoe_megatron.bench.wire_rank import WireCounter

    dist, world = torch.distributed, torch.distributed.group.WORLD
    rank = dist.get_rank()
    counter, unnamed = WireCounter([("world", world)]), dist.new_group()
    row = torch.full((1, 2), float(rank))  # 8 bytes
    with counter:
        total = row.clone()
        dist.all_reduce(total, group=world)
        gathered = row.new_empty(WORLD, 2)
        dist.all_gather_into_tensor(gathered, row, group=world)
        dist.all_gather(list(gathered.split(1)), row, group=world)
        mappings.dist_all_gather_func(gathered, row, group=world)
        counter.enter_pass(True)
        own = torch.empty_like(row)
        dist.reduce_scatter_tensor(own, gathered.contiguous(), group=world)
        sent = torch.arange(rank + 3.0).view(-1, 1)  # rank + 1 rows to itself, 1 to each other
        splits = [1 + rank * (other == rank) for other in range(WORLD)]
        dist.all_to_all_single(torch.empty_like(sent), sent, splits, splits, group=world)
        dist.all_to_all_single(torch.empty(3), torch.zeros(3), group=world)
        dist.all_reduce(total, group=unnamed)
    dist.all_reduce(row)  # not counted any more
    return {"sent": counter.sent, "total": gathered.sum().item()}


def test_every_collective_is_counted(ranks) -> None:  # noqa: ANN001
    for found in ranks(WORLD).run(collectives):
        counted = [(*term[:3], Fraction(term[3], term[4])) for term in found["sent"]]
        assert counted == [
            (False, "all_reduce", "world", Fraction(2 * 2 * 8, 3)),
            (False, "all_gather", "world", 16),
            (False, "all_gather", "world", 16),
            (False, "all_gather", "world", 16),
            (True, "reduce_scatter", "world", 16),
            (True, "all_to_all", "world", 8),
            (True, "all_to_all", "world", 8),
            (True, "all_reduce", "other", Fraction(2 * 2 * 8, 3)),
        ]
        assert found["total"] == 2 * (0 + 1 + 2)
