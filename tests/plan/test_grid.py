"""Coordinates against a drawn grid and megatron-core's own generator, groups of an axis against
groups read from the grid, and who owns which experts and codes."""

from __future__ import annotations

import inspect
from dataclasses import replace
from itertools import product

import pytest
from owners import owner_of_code, owner_rank
from real_model import recipe

from vqmoe_megatron.config import ParallelConfig, RunConfig
from vqmoe_megatron.plan.grid import (
    RankCoordinates,
    axis_place,
    code_owners,
    first_group,
    rank_grid,
    ranks_in_words,
)
from vqmoe_megatron.plan.layout import ParallelLayout, check_layout


def layout_of(world_size: int, tp=1, pp=1, cp=1, ep=1, etp=1) -> ParallelLayout:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    return ParallelLayout.from_config(RunConfig(parallel=parallel), world_size)


def test_drawn_grid() -> None:
    # TP 2, PP 2, EP 4, 8 ranks:   rank  0  1  2  3 | 4  5  6  7
    grid = rank_grid(layout_of(8, tp=2, pp=2, ep=4))
    assert [c.rank for c in grid] == list(range(8))
    assert [c.tensor for c in grid] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert [c.data for c in grid] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert [c.pipeline for c in grid] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [c.expert for c in grid] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert {(c.context, c.expert_tensor, c.expert_data) for c in grid} == {(0, 0, 0)}


def coordinates(groups: list[list[int]]) -> dict[int, int]:
    """A rank's coordinate along an axis is its place in its group of that axis."""
    return {rank: place for group in groups for place, rank in enumerate(group)}


@pytest.mark.parametrize(
    "sizes",
    [
        {"world_size": 1},
        {"world_size": 8, "tp": 2, "ep": 4},
        {"world_size": 8, "tp": 2, "pp": 2, "ep": 2},
        {"world_size": 16, "tp": 2, "pp": 2, "cp": 2, "ep": 4, "etp": 2},
        {"world_size": 16, "cp": 4, "ep": 2},
        {"world_size": 24, "tp": 2, "pp": 3, "ep": 2, "etp": 2},
    ],
    ids=lambda sizes: "-".join(f"{name}{size}" for name, size in sizes.items()),
)
def test_grid_equals_megatrons_rank_generator(sizes: dict[str, int]) -> None:
    from megatron.core.parallel_state import RankGenerator, initialize_model_parallel

    layout = layout_of(**sizes)
    order = inspect.signature(initialize_model_parallel).parameters["order"].default
    dense = RankGenerator(
        tp=layout.tensor_model_parallel_size,
        ep=1,
        dp=layout.data_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        cp=layout.context_parallel_size,
        order=order,
    )
    experts = RankGenerator(
        tp=layout.expert_tensor_parallel_size,
        ep=layout.expert_model_parallel_size,
        dp=layout.expert_data_parallel_size,
        pp=layout.pipeline_model_parallel_size,
        cp=1,
        order=order,
    )
    grid = rank_grid(layout)
    ours_and_megatrons = {
        "tensor": dense.get_ranks("tp"),
        "context": dense.get_ranks("cp"),
        "data": dense.get_ranks("dp"),
        "pipeline": dense.get_ranks("pp"),
        "expert": experts.get_ranks("ep"),
        "expert_tensor": experts.get_ranks("tp"),
        "expert_data": experts.get_ranks("dp"),
    }
    for axis, groups in ours_and_megatrons.items():
        assert {c.rank: getattr(c, axis) for c in grid} == coordinates(groups), axis


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (layout_of(6, tp=4), r"world_size % \(TP \* PP \* CP\) != 0: 6 % 4 = 2"),
        (layout_of(6, ep=4), r"world_size % \(EP \* ETP \* PP\) != 0: 6 % 4 = 2"),
        (replace(layout_of(4), world_size=3, context_parallel_size=2), "3 % 2 = 1"),
    ],
)
def test_grid_that_does_not_tile_the_world_is_refused(layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rank_grid(layout)


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


def test_experts_lie_in_contiguous_blocks() -> None:
    # N = 8, P = 4      rank     0      1      2      3
    #                   experts  0 1    2 3    4 5    6 7
    assert [owner_rank(e, 8, 4) for e in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_codes_follow_their_expert_through_the_mod_map() -> None:
    # code    0 1 2 3 4 5 6 7 8 9
    # expert  0 1 2 3 0 1 2 3 0 1      (mod 4)
    # rank    0 0 1 1 0 0 1 1 0 0      (two experts per rank)
    assert [owner_of_code(c, 4, 2) for c in range(10)] == [0, 0, 1, 1, 0, 0, 1, 1, 0, 0]


@pytest.mark.parametrize(("num_experts", "ep"), [(1, 1), (8, 1), (8, 8), (12, 3)])
def test_every_expert_is_owned_by_exactly_the_rank_that_lists_it(num_experts: int, ep: int) -> None:
    sizes = [f"model.num_moe_experts={num_experts}", f"parallel.expert_model_parallel_size={ep}"]
    small = ["model.moe_router_topk=1", "train.global_batch_size=24", "train.micro_batch_size=1"]
    config = recipe([*sizes, *small])
    owners = code_owners(config, check_layout(config, ep, "cpu"))
    assert [owner.expert_parallel_rank for owner in owners] == list(range(ep))
    listed = [range(owner.first_expert, owner.last_expert + 1) for owner in owners]
    assert [e for experts in listed for e in experts] == list(range(num_experts))
    for expert in range(num_experts):
        assert expert in listed[owner_rank(expert, num_experts, ep)]


@pytest.mark.parametrize("num_codes", [16, 13])
def test_owners_have_the_codes_of_their_experts(num_codes: int) -> None:
    config = recipe([f"vq.num_codes={num_codes}", "parallel.expert_model_parallel_size=4"])
    owned = [0] * 4
    for code in range(num_codes):
        owned[owner_of_code(code, 8, 4)] += 1
    owners = code_owners(config, check_layout(config, 4, "cpu"))
    assert [owner.num_code_rows for owner in owners] == owned
    assert [(o.first_expert, o.last_expert) for o in owners] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    continuous = recipe(["vq.path=continuous"])
    (owner,) = code_owners(continuous, check_layout(continuous, 1, "cpu"))
    assert owner.num_code_rows == 0
    filled = recipe(["vq.path=filled", "vq.num_codes=5", "parallel.expert_model_parallel_size=4"])
    owners = code_owners(filled, check_layout(filled, 4, "cpu"))
    assert [owner.num_code_rows for owner in owners] == [2 * 5] * 4
    assert owners[3].codes == "every code of experts 6..7"


def test_equal_maps_own_an_equal_share_that_the_data_will_name() -> None:
    config = recipe(["vq.code_map=balanced", "parallel.expert_model_parallel_size=4"])
    owners = code_owners(config, check_layout(config, 4, "cpu"))
    assert [o.num_code_rows for o in owners] == [config.vq.num_codes // 4] * 4
    assert {o.codes for o in owners} == {"fixed from the first data (balanced)"}
