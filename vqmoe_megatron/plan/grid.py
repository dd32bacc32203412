"""Where each rank stands, which ranks communicate, and who owns which experts and codes.

Megatron's default order is ``tp-cp-ep-dp-pp``, the leftmost axis varying fastest. Two grids lie
over the same ranks; both have PP outermost, so a rank's pipeline stage is the same in both:

    dense    rank = tp  + TP  * (cp + CP * (dp  + DP  * pp))
    experts  rank = etp + ETP * (ep + EP * (edp + EDP * pp))

    TP 2, PP 2, EP 2, 8 ranks:   rank       0  1  2  3 | 4  5  6  7
                                 (tp, dp)  00 10 01 11 |00 10 01 11
                                 (ep, edp) 00 10 01 11 |00 10 01 11
                                 pp          stage 0   |  stage 1

An axis is a product of (stride, size) pairs over rank numbers; nodes are consecutive ranks. Of its
groups the worst is counted: the one over the most nodes, with the fewest ranks on one of them.

Experts lie in contiguous blocks: of N on P expert-parallel ranks, rank r owns ``[r N / P, (r + 1) N
/ P)``. Under the map ``mod`` code row r (slice * K + code) belongs to expert r mod N; the maps
``balanced`` and ``clustered`` are fixed from the first data: how many rows a rank gets is known
before, which ones is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import lcm

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.hardware import Hardware
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.shape import LayerShape

Strides = tuple[tuple[int, int], ...]  # (stride, size), fastest first
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
class RankCoordinates:
    """One rank's place along every axis of both grids."""

    rank: int
    tensor: int
    context: int
    data: int
    pipeline: int
    expert: int
    expert_tensor: int
    expert_data: int


def rank_grid(layout: ParallelLayout) -> list[RankCoordinates]:
    """Return the coordinates of ranks ``0 .. world_size-1``, in order. Communicates nothing.

    Raises ``ValueError`` when a grid does not tile the world.
    """
    for name, size in (
        ("TP * PP * CP", layout.dense_ranks),
        ("EP * ETP * PP", layout.expert_ranks),
    ):
        if layout.world_size % size:
            raise ValueError(
                f"world_size % ({name}) != 0: {layout.world_size} % {size} = "
                f"{layout.world_size % size}"
            )
    return [_coordinates(rank, layout) for rank in range(layout.world_size)]


def _coordinates(rank: int, layout: ParallelLayout) -> RankCoordinates:
    """Peel the axes of both grids off a rank's number, fastest first."""
    outer, tensor = divmod(rank, layout.tensor_model_parallel_size)
    outer, context = divmod(outer, layout.context_parallel_size)
    pipeline, data = divmod(outer, layout.data_parallel_size)
    outer, expert_tensor = divmod(rank, layout.expert_tensor_parallel_size)
    outer, expert = divmod(outer, layout.expert_model_parallel_size)
    expert_data = outer % layout.expert_data_parallel_size
    return RankCoordinates(
        rank, tensor, context, data, pipeline, expert, expert_tensor, expert_data
    )


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

    @property
    def link(self) -> str:
        """The link that the traffic needs: ``intra_node`` or ``inter_node``."""
        return "inter_node" if self.spans_nodes else "intra_node"


def axis_strides(layout: ParallelLayout, axis: str) -> Strides:
    """Return the (stride, size) pairs of an axis named as in ``wire``.

    Raises:
        ValueError: for an unknown axis.
    """
    stages = layout.pipeline_model_parallel_size
    tensor, context = layout.tensor_model_parallel_size, layout.context_parallel_size
    shards, experts = layout.expert_tensor_parallel_size, layout.expert_model_parallel_size
    per_stage = layout.world_size // stages
    pipeline = (per_stage, stages)
    axes: dict[str, Strides] = {
        "tp": ((1, tensor),),
        "dp": ((tensor, context * layout.data_parallel_size),),
        "tp_dp": ((1, per_stage),),
        "expt_tp": ((1, shards),),
        "ep": ((shards, experts),),
        "expt_dp": ((shards * experts, layout.expert_data_parallel_size),),
        "pp": (pipeline,),
        "embedding": ((per_stage * max(stages - 1, 1), min(2, stages)),),
        "world": ((1, layout.world_size),),
        "tp_pp": ((1, tensor * context), pipeline),
        "expt_tp_ep": ((1, shards * experts),),
        "expt_tp_ep_pp": ((1, shards * experts), pipeline),
    }
    if axis not in axes:
        raise ValueError(f"axis {axis!r}: choose one of {', '.join(axes)}")
    return axes[axis]


def axis_place(layout: ParallelLayout, axis: str, devices_per_node: int) -> AxisPlace:
    """Return where the worst group of ``axis`` lies, for nodes of so many devices."""
    return _worst(axis_strides(layout, axis), layout.world_size, devices_per_node)


@lru_cache(maxsize=4096)
def _worst(strides: Strides, world_size: int, devices_per_node: int) -> AxisPlace:
    offsets = _offsets(strides)
    (stride, size), extent = strides[0], max(offsets) + 1
    period = min(world_size, lcm(devices_per_node, stride * size))
    most_nodes, fewest = 1, len(offsets)
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
    return AxisPlace(len(offsets), most_nodes, fewest)


def _offsets(strides: Strides) -> list[int]:
    """Ranks of a group, counted from its first."""
    steps = product(*(range(size) for _, size in strides))
    return [sum(i * stride for i, (stride, _) in zip(at, strides, strict=True)) for at in steps]


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
        groups.append(
            RankGroup(
                axis=axis,
                purpose=purpose,
                num_groups=layout.world_size // place.num_ranks,
                num_ranks=place.num_ranks,
                first_group=ranks_in_words(first_group(layout, axis)),
                nodes=place.num_nodes,
                link=place.link if place.num_ranks > 1 else "none",
            )
        )
    return groups


def first_group(layout: ParallelLayout, axis: str) -> list[int]:
    """Ranks of the group that rank 0 is in."""
    return sorted(_offsets(axis_strides(layout, axis)))


def ranks_in_words(ranks: list[int]) -> str:
    """``0 1 2 3``, and of many ``0 8 16 ... 504``."""
    if len(ranks) <= SHOWN_RANKS:
        return " ".join(map(str, ranks))
    return f"{' '.join(map(str, ranks[:3]))} ... {ranks[-1]}"


@dataclass(frozen=True)
class CodeOwner:
    """One expert-parallel rank; the ranks with this coordinate hold the same experts."""

    expert_parallel_rank: int
    first_expert: int
    last_expert: int
    num_code_rows: int
    codes: str  # which rows, in words


def code_owners(config: RunConfig, layout: ParallelLayout) -> list[CodeOwner]:
    """Return the owners in rank order, for a layout that passed the check."""
    layer = LayerShape.from_config(config, layout)
    per_rank = layer.num_experts_per_rank
    owners = []
    for rank in range(layer.expert_model_parallel_size):
        first, last = rank * per_rank, (rank + 1) * per_rank - 1
        if layer.vq.path == "filled":
            words = f"every code of experts {first}..{last}"
        elif layer.vq.path == "continuous":
            words = "no codes (path=continuous)"
        elif layer.vq.code_map == "mod":
            words = f"row mod {layer.num_moe_experts} in {first}..{last}"
        else:
            words = f"fixed from the first data ({layer.vq.code_map})"
        num_rows = layer.num_code_rows_of(rank) if layer.vq.has_codes else 0
        owners.append(CodeOwner(rank, first, last, num_rows, words))
    return owners
