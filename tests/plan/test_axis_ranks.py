"""Groups of an axis against groups read from the rank grid."""

from __future__ import annotations

from itertools import product

import pytest

from vqmoe_megatron.plan.axis_ranks import axis_place
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.plan.rank_grid import RankCoordinates, rank_grid
from vqmoe_megatron.plan.rank_groups import first_group, ranks_in_words

# Coordinates that all ranks of a group share.
SHARED = {
    "tp": lambda p: (p.data, p.pipeline),
    "dp": lambda p: (p.tensor, p.pipeline),
    "tp_dp": lambda p: (p.pipeline,),
    "pp": lambda p: (p.tensor, p.data),
    "ep": lambda p: (p.expert_tensor, p.expert_data, p.pipeline),
    "expt_tp": lambda p: (p.expert, p.expert_data, p.pipeline),
    "expt_dp": lambda p: (p.expert_tensor, p.expert, p.pipeline),
    "tp_pp": lambda p: (p.data,),
    "expt_tp_ep_pp": lambda p: (p.expert_data,),
    "world": lambda p: (),
}
LAYOUTS = [
    ParallelLayout(24, 2, 3, None, 1, 2, 1, True),
    ParallelLayout(16, 4, 2, None, 1, 2, 2, True),
    ParallelLayout(12, 3, 1, None, 1, 4, 1, True),
]


@pytest.mark.parametrize(("layout", "axis", "node"), list(product(LAYOUTS, SHARED, (4, 8))))
def test_worst_group(layout: ParallelLayout, axis: str, node: int) -> None:
    groups: dict[tuple, list[RankCoordinates]] = {}
    for place in rank_grid(layout):
        groups.setdefault(SHARED[axis](place), []).append(place)
    spread = []
    for members in groups.values():
        nodes = [place.rank // node for place in members]
        spread.append((len(set(nodes)), -min(nodes.count(n) for n in nodes)))
    most_nodes, fewest = max(spread)
    found = axis_place(layout, axis, node)
    assert (found.num_nodes, found.ranks_per_node) == (most_nodes, -fewest)
    of_rank_0 = next(members for members in groups.values() if members[0].rank == 0)
    assert first_group(layout, axis) == [place.rank for place in of_rank_0]
    assert found.num_ranks == len(of_rank_0)


def test_unknown_axis() -> None:
    with pytest.raises(ValueError, match="axis 'cp': choose one of tp, dp"):
        axis_place(LAYOUTS[0], "cp", 8)


def test_long_groups_are_shortened() -> None:
    assert ranks_in_words([0, 1]) == "0 1"
    assert ranks_in_words(list(range(0, 512, 8))) == "0 8 16 ... 504"
