"""Axes: names that stay, every bad axis named with its nearest legal ones."""

from __future__ import annotations

import pytest

from vqmoe_megatron.study.axes import points, read_axes, read_exclusions

GRID = {
    "experts": [4, 64],
    "router": {"smoe": ["vq.path=continuous"], "vq": ["vq.path=dual", "vq.combine_bias=0.0"]},
    "seed": [1, 2],
}


def grid_points(grid, exclude=()):
    problems: list[str] = []
    axes = read_axes(grid, problems)
    exclusions = read_exclusions(list(exclude), axes, problems)
    assert problems == []
    return points(axes, exclusions)


def test_every_combination_once_with_a_readable_name() -> None:
    names = [point.name for point in grid_points(GRID)]
    assert names == [
        "experts4-smoe-seed1",
        "experts4-smoe-seed2",
        "experts4-vq-seed1",
        "experts4-vq-seed2",
        "experts64-smoe-seed1",
        "experts64-smoe-seed2",
        "experts64-vq-seed1",
        "experts64-vq-seed2",
    ]
    last = grid_points(GRID)[-1]
    assert dict(last.values) == {"experts": 64, "router": "vq", "seed": 2}
    assert last.overrides == (
        "model.num_moe_experts=64",
        "vq.path=dual",
        "vq.combine_bias=0.0",
        "train.seed=2",
    )


def test_names_stay_when_axes_get_more_values() -> None:
    before = {point.name: point for point in grid_points(GRID)}
    more = {"experts": [2, 4, 16, 64], "router": GRID["router"] | {"d": []}, "seed": [3, 2, 1]}
    after = {point.name: point for point in grid_points(more)}
    assert len(after) == 4 * 3 * 3
    assert {name: after[name] for name in before} == before


def test_a_recipe_key_and_its_short_name_are_one_axis() -> None:
    (point,) = grid_points({"model.num_moe_experts": [4]})
    assert point.name == "experts4" and dict(point.values) == {"experts": 4}


def test_text_bool_and_number_values_in_names() -> None:
    grid = {"optimizer.lr": [0.003], "execution": ["tokens"], "vq.table_per_step": [False]}
    (point,) = grid_points(grid | {"codes": ["4 * experts"]})
    assert point.name == "lr0.003-execution_tokens-table_per_step_false-codes4xexperts"
    assert "vq.table_per_step=false" in point.overrides
    assert "vq.num_codes=4 * experts" in point.overrides


def test_exclusions_leave_out_exactly_their_points() -> None:
    left = grid_points(GRID, [{"experts": 64, "router": "smoe"}, {"seed": [2], "router": "vq"}])
    assert [point.name for point in left] == [
        "experts4-smoe-seed1",
        "experts4-smoe-seed2",
        "experts4-vq-seed1",
        "experts64-vq-seed1",
    ]


def test_nothing_left_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves no run"):
        grid_points(GRID, [{"seed": [1, 2]}])


def test_two_points_of_one_name_are_refused() -> None:
    grid = {"data.path": ["x", "x-device_a"], "train.device": ["b", "a-device_b"]}
    with pytest.raises(ValueError, match="two points .* called path_x-device_a-device_b"):
        grid_points(grid)


BAD_GRIDS = {
    "misspelt short name": ({"expert": [4]}, ["grid.expert", "did you mean experts?"]),
    "misspelt key": ({"vq.num_code": [4]}, ["grid.vq.num_code", "vq.num_codes"]),
    "key without its section": ({"hidden_size": [4]}, ["did you mean model.hidden_size?"]),
    "no list": ({"experts": 4}, ["grid.experts must be a list"]),
    "empty": ({}, ["grid must hold"]),
    "twice": ({"experts": [4, 4]}, ["grid.experts holds 4 twice"]),
    "no name": ({"data.path": ["a/b"]}, ["'a/b' cannot be part of a name", "named variants"]),
    "variant": ({"router": {"vq": "vq.path=dual"}}, ["grid.router.vq must be a list"]),
    "illegal name": ({"arm": {"a-b": []}}, ["grid.arm: a variant's name is letters"]),
    "nested": ({"arm": {"a": {"vq": {"path": "dual"}}}}, ["grid.arm.a.vq must be one value"]),
    "two axes, one key": (
        {"experts": [4], "router": {"vq": ["model.num_moe_experts=8"]}},
        ["model.num_moe_experts is set by two axes, experts and router"],
    ),
    "same axis": ({"seed": [1], "train.seed": [2]}, ["is the axis seed"]),
}


@pytest.mark.parametrize("name", BAD_GRIDS)
def test_a_bad_axis_is_named(name) -> None:
    grid, says = BAD_GRIDS[name]
    problems: list[str] = []
    read_axes(grid, problems)
    assert len(problems) == 1
    for text in says:
        assert text in problems[0]


def test_bad_exclusions_are_named() -> None:
    problems: list[str] = []
    axes = read_axes(GRID, problems)
    read_exclusions([{"routr": "vq"}, {"experts": 5}], axes, problems)
    assert "unknown axis 'routr': did you mean router?" in problems[0]
    assert "experts=5 is not in the grid; it has 4, 64" in problems[1]
    read_exclusions({"experts": 4}, axes, problems)
    assert "must be a list of combinations" in problems[2]
