"""Which ranks an axis joins, and whether they share a node.

An axis is a product of (stride, size) pairs over rank numbers, in Megatron's order (``rank_grid``);
nodes are consecutive ranks. Counted is the worst group: the most nodes, the fewest ranks on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import lcm, prod

from vqmoe_megatron.plan.layout import ParallelLayout

Strides = tuple[tuple[int, int], ...]  # (stride, size), fastest first


@dataclass(frozen=True)
class AxisPlace:
    """Where the worst group of an axis lies."""

    num_ranks: int
    num_nodes: int
    ranks_per_node: int  # on the node with the fewest of the group's ranks

    @property
    def spans_nodes(self) -> bool:
        """Whether its traffic leaves the node."""
        return self.num_nodes > 1


def axis_strides(layout: ParallelLayout, axis: str) -> Strides:
    """Return the (stride, size) pairs of an axis named as in ``step_wire_terms``.

    Raises:
        ValueError: for an unknown axis.
    """
    stages = layout.pipeline_model_parallel_size
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    shards, experts = layout.expert_tensor_parallel_size, layout.expert_model_parallel_size
    per_stage = layout.world_size // stages
    along = {
        "tp": (1, tensor),
        "dp": (tensor, context * layout.data_parallel_size),
        "tp_dp": (1, per_stage),
        "expt_tp": (1, shards),
        "ep": (shards, experts),
        "expt_dp": (shards * experts, layout.expert_data_parallel_size),
        "pp": (per_stage, stages),
        "embedding": (per_stage * max(stages - 1, 1), min(2, stages)),
        "world": (1, layout.world_size),
    }
    together = {
        "tp_pp": ((1, tensor * context), along["pp"]),
        "expt_tp_ep_pp": ((1, shards * experts), along["pp"]),
    }
    if axis in along:
        return (along[axis],)
    if axis in together:
        return together[axis]
    raise ValueError(f"axis {axis!r}: choose one of {', '.join([*along, *together])}")


def axis_place(layout: ParallelLayout, axis: str, devices_per_node: int) -> AxisPlace:
    """Return where the worst group of ``axis`` lies, for nodes of so many devices."""
    return _worst(axis_strides(layout, axis), layout.world_size, devices_per_node)


@lru_cache(maxsize=4096)
def _worst(strides: Strides, world_size: int, devices_per_node: int) -> AxisPlace:
    num_ranks = prod(size for _, size in strides)
    offsets = [0]
    for stride, size in strides:
        offsets = [offset + stride * step for offset, step in product(offsets, range(size))]
    (stride, size), extent = strides[0], max(offsets) + 1
    period = min(world_size, lcm(devices_per_node, stride * size))
    most_nodes, fewest = 1, num_ranks
    for start in range(period):
        if start + extent > world_size or start % (stride * size) >= stride:
            continue  # not the first rank of a group
        ranks_on: dict[int, int] = {}
        for offset in offsets:
            node = (start + offset) // devices_per_node
            ranks_on[node] = ranks_on.get(node, 0) + 1
        if len(ranks_on) > most_nodes or (
            len(ranks_on) == most_nodes and min(ranks_on.values()) < fewest
        ):
            most_nodes, fewest = len(ranks_on), min(ranks_on.values())
    return AxisPlace(num_ranks, most_nodes, fewest)
