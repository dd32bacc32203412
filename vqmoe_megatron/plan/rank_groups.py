"""The process groups of a layout: how many of each kind, which ranks, and over which link."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from vqmoe_megatron.plan.axis_ranks import axis_place, axis_strides
from vqmoe_megatron.plan.hardware import Hardware
from vqmoe_megatron.plan.layout import ParallelLayout

SHOWN_RANKS = 8
PURPOSES = {
    "tp": "tensor parallel: shards of attention, dense MLPs, vocabulary, sequence",
    "ep": "expert parallel: rows travel to their experts, tables of code outputs",
    "expt_tp": "expert tensor parallel: shards of an expert",
    "pp": "pipeline: activations between stages",
    "dp": "replicas of the dense layers: their gradients",
    "expt_dp": "replicas of the experts: their gradients",
    "tp_dp": "replicas of a codebook: its statistics",
}


@dataclass(frozen=True)
class RankGroup:
    """All groups of one axis."""

    axis: str
    purpose: str
    num_groups: int
    num_ranks: int  # of one group
    first_group: str  # its ranks, shortened
    nodes: int  # that the worst group spans
    link: str  # intra_node | inter_node | none


def rank_groups(layout: ParallelLayout, hardware: Hardware) -> list[RankGroup]:
    """Return the groups along which training communicates."""
    groups = []
    for axis, purpose in PURPOSES.items():
        place = axis_place(layout, axis, hardware.devices_per_node)
        link = "inter_node" if place.spans_nodes else "intra_node"
        groups.append(
            RankGroup(
                axis=axis,
                purpose=purpose,
                num_groups=layout.world_size // place.num_ranks,
                num_ranks=place.num_ranks,
                first_group=ranks_in_words(first_group(layout, axis)),
                nodes=place.num_nodes,
                link=link if place.num_ranks > 1 else "none",
            )
        )
    return groups


def first_group(layout: ParallelLayout, axis: str) -> list[int]:
    """Ranks of the group that rank 0 is in."""
    ranks = [0]
    for stride, size in axis_strides(layout, axis):
        ranks = [rank + stride * step for rank, step in product(ranks, range(size))]
    return sorted(ranks)


def ranks_in_words(ranks: list[int]) -> str:
    """``0 1 2 3``, and of many ``0 8 16 ... 504``."""
    if len(ranks) <= SHOWN_RANKS:
        return " ".join(map(str, ranks))
    return f"{' '.join(map(str, ranks[:3]))} ... {ranks[-1]}"
