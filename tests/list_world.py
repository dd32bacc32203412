"""A world of lists: ranks exchange items one by one, and what each sends is counted.

P expert-parallel ranks, E expert-tensor ranks; rank (p, e). The world counts what each collective
carries away from a rank, under the conventions of plan/wire.py, and moves real items, so that a
wrong destination or a wrong padding shows.
"""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from itertools import product

Rank = tuple[int, int]  # (p, e)


class World:
    """P * E ranks that exchange lists of items of a known size; ``sent`` is what each one sent."""

    def __init__(self, num_ranks: int, num_shards: int) -> None:
        self.num_ranks, self.num_shards = num_ranks, num_shards
        self.ranks: list[Rank] = list(product(range(num_ranks), range(num_shards)))
        self.sent: dict[tuple[Rank, bool], Fraction] = defaultdict(Fraction)
        self.is_backward = False

    def _send(self, source: Rank, item_bytes: Fraction | int, num_items: int) -> None:
        self.sent[source, self.is_backward] += Fraction(item_bytes) * num_items

    def all_to_all(self, boxes: dict[Rank, list[list]], item_bytes: int) -> dict[Rank, list[list]]:
        """boxes[p, e][q]: items for rank (q, e); returned by source."""
        for (p, e), lists in boxes.items():
            for q, items in enumerate(lists):
                if q != p:
                    self._send((p, e), item_bytes, len(items))
        return {(p, e): [boxes[q, e][p] for q in range(self.num_ranks)] for p, e in self.ranks}

    def gather_shards(self, blocks: dict[Rank, list], item_bytes: int) -> dict[Rank, list]:
        """Each shard's block, padded to the largest of its group, to the E - 1 others."""
        for p, e in self.ranks:
            largest = max(len(blocks[p, other]) for other in range(self.num_shards))
            self._send((p, e), item_bytes, largest * (self.num_shards - 1))
        return {
            (p, e): [item for other in range(self.num_shards) for item in blocks[p, other]]
            for p, e in self.ranks
        }

    def scatter_shards(
        self, blocks: dict[Rank, list], sizes: dict[Rank, int], item_bytes: int
    ) -> dict[Rank, list]:
        """Each shard's part of every other one's block, padded to the largest; own items stay."""
        kept: dict[Rank, list] = {}
        for p, e in self.ranks:
            of_group = [sizes[p, other] for other in range(self.num_shards)]
            self._send((p, e), item_bytes, max(of_group) * (self.num_shards - 1))
            first = sum(of_group[:e])
            kept[p, e] = blocks[p, e][first : first + of_group[e]]
        return kept

    def ring_all_reduce(self, num_bytes: int, group_size: int) -> None:
        """A ring: group_size - 1 hops to sum and as many to share, a chunk of 1 / size each."""
        for rank in self.ranks:
            for _hop in range(2 * (group_size - 1)):
                self._send(rank, Fraction(num_bytes, group_size), 1)

    def exchange_counts(self, num_slots: int) -> None:
        own = num_slots // self.num_ranks
        arrived = self.all_to_all(
            {rank: [[0] * own for _ in range(self.num_ranks)] for rank in self.ranks}, 8
        )
        self.gather_shards({rank: sum(lists, []) for rank, lists in arrived.items()}, 8)

    def to_owners(self, boxes: dict[Rank, list[list]], item_bytes: int) -> tuple[dict, dict, dict]:
        """Rows to all shards of their owner: gathered rows, their split, sizes per rank."""
        arrived = self.all_to_all(boxes, item_bytes)
        split = {rank: [len(items) for items in lists] for rank, lists in arrived.items()}
        flat = {rank: sum(lists, []) for rank, lists in arrived.items()}
        sizes = {rank: len(items) for rank, items in flat.items()}
        return self.gather_shards(flat, item_bytes), split, sizes

    def from_owners(self, rows: dict, split: dict, sizes: dict, item_bytes: int) -> dict:
        """The way back of :meth:`to_owners`."""
        kept = self.scatter_shards(rows, sizes, item_bytes)
        boxes = {}
        for rank, items in kept.items():
            rest = iter(items)
            boxes[rank] = [[next(rest) for _ in range(size)] for size in split[rank]]
        return self.all_to_all(boxes, item_bytes)
