"""Which axis holds the arms, and what cannot be told is said."""

from __future__ import annotations

import pytest

from vqmoe_megatron.study.baselines import Arms, find_arms, read_baselines

EXPERTS = {"experts": [4, 8]}
ROUTER = {"router": ["smoe", "smoe2", "vq"]}
PATH = {"path": ["dual", "discrete"]}


@pytest.mark.parametrize(
    ("axes", "baselines", "arms"),
    [
        (EXPERTS | ROUTER, (), Arms("router", ("smoe", "smoe2", "vq"), ("smoe",))),
        (ROUTER, ("smoe2", "smoe"), Arms("router", ("smoe", "smoe2", "vq"), ("smoe2", "smoe"))),
        (PATH | ROUTER, ("discrete",), Arms("path", ("dual", "discrete"), ("discrete",))),
        (PATH | {"arm": ["a", "b"]}, (), Arms("arm", ("a", "b"), ("a",))),
        (PATH | {"size": ["small"]}, (), Arms("path", ("dual", "discrete"), ("dual",))),
    ],
)
def test_the_arms_are_the_words_of_one_axis(axes, baselines, arms) -> None:
    assert find_arms(axes, baselines) == arms


@pytest.mark.parametrize(
    ("axes", "baselines", "says"),
    [
        (EXPERTS, (), "no axis has two named values"),
        (PATH | ROUTER, (), "those of path or router; name one of them in study.baseline"),
        (ROUTER, ("smo",), "'smo' is no named value of the grid: did you mean smoe"),
        (EXPERTS | ROUTER, ("x",), "it has smoe, smoe2, vq"),
        (PATH | ROUTER, ("dual", "vq"), "are of different axes"),
        (PATH | {"other": ["dual", "x"]}, ("dual",), "in the axes path and other; rename"),
        ({"arm": ["only"]}, (), "has one arm, only"),
    ],
)
def test_what_cannot_be_told_is_refused(axes, baselines, says) -> None:
    with pytest.raises(ValueError, match=says):
        find_arms(axes, baselines)


def test_the_key_is_a_name_or_a_list_of_names() -> None:
    assert read_baselines(None) == () and read_baselines("a") == ("a",)
    assert read_baselines(["a", "b"]) == ("a", "b")
    for wrong in ([], 3, [1], ""):
        with pytest.raises(ValueError, match="must be an arm or a list of arms"):
            read_baselines(wrong)
