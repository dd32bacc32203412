"""Overrides of some points only: which points get them, and what would silently win is refused."""

from __future__ import annotations

import pytest

from vqmoe_megatron.study.axes import points, read_axes
from vqmoe_megatron.study.when import read_when, with_rows

GRID = {
    "experts": [4, 64],
    "arm": {"smoe": {"vq.path": "continuous"}, "vq": {}},
    "seed": [1, 2],
}


def read(*rows):
    problems: list[str] = []
    axes = read_axes(GRID, problems)
    return read_when(list(rows), axes, problems), points(axes, []), problems


def test_a_row_reaches_exactly_the_points_that_meet_all_of_it() -> None:
    row = {"arm": "vq", "model.num_moe_experts": [64], "set": {"optimizer.lr": 0.001}}
    rows, before, problems = read(row, {"seed": 2, "set": ["train.eval_iters=3"]})
    assert problems == []
    after = with_rows(before, rows)
    added = {
        new.name: new.overrides[len(old.overrides) :]
        for old, new in zip(before, after, strict=True)
    }
    assert {name for name, texts in added.items() if "optimizer.lr=0.001" in texts} == {
        "experts64-vq-seed1",
        "experts64-vq-seed2",
    }
    assert added["experts64-vq-seed2"] == ("optimizer.lr=0.001", "train.eval_iters=3")
    assert added["experts4-smoe-seed1"] == ()


BAD_ROWS = {
    "unknown axis": ({"arms": "vq", "set": ["a.b=1"]}, "when: unknown axis 'arms': did you mean"),
    "unknown value": ({"arm": "vqq", "set": ["a.b=1"]}, "when: arm=vqq is not in the grid"),
    "a key of an axis": ({"experts": 4, "set": {"vq.path": "dual"}}, "is set by the axis arm"),
    "nothing set": ({"experts": 4, "set": []}, "when must be a list"),
    "everywhere": ({"set": ["optimizer.lr=1"]}, "when must be a list"),
    "no override": ({"experts": 4, "set": "optimizer.lr=1"}, "when: set must be a list"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(name) -> None:
    row, says = BAD_ROWS[name]
    _, _, (problem,) = read(row)
    assert says in problem


def test_two_rows_on_one_key_of_a_point_and_a_row_for_no_point_are_refused() -> None:
    one, other = ({"arm": "vq", "set": [f"optimizer.lr={lr}"]} for lr in (1, 2))
    rows, before, _ = read(one, other)
    with pytest.raises(ValueError, match=r"two rows set optimizer.lr of experts4-vq-seed1"):
        with_rows(before, rows)
    rows, before, _ = read(one)
    left = [point for point in before if point.values["arm"] == "smoe"]  # exclude took the others
    with pytest.raises(ValueError, match=r"no run of the grid has arm=\['vq'\]"):
        with_rows(left, rows)
