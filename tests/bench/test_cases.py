"""Sizes are refused with the number that is wrong; the grid names what it leaves out."""

from __future__ import annotations

import pytest

from vqmoe_megatron.bench.cases import (
    LayerCase,
    check_repeats,
    layer_cases,
    parse_choices,
    parse_codes,
    parse_numbers,
)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_tokens": 0}, "num_tokens=0 must be at least 1"),
        ({"hidden_size": -8}, "hidden_size=-8"),
        ({"hidden_size": 18}, "hidden_size % 4 != 0: 18 % 4 = 2"),
        ({"hidden_size": 20, "dtype": "bfloat16"}, "hidden_size % 8 != 0: 20 % 8 = 4"),
        ({"ffn_hidden_size": 6}, r"moe_ffn_hidden_size % .* != 0: 6 % 4 = 2"),
        ({"num_experts": 8, "num_codes": 4}, "num_codes=4 < num_experts=8"),
        ({"routing": "random"}, "balanced, zipf, one-hot"),
        ({"norm": "both"}, "none, separate, shared"),
        ({"dtype": "float64"}, "float32, bfloat16"),
    ],
)
def test_an_illegal_case_is_refused(fields: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        LayerCase(**fields)


def test_the_grid_is_every_legal_combination_once() -> None:
    cases, left_out = layer_cases([16, 64, 256], [64, None], ["balanced"], num_tokens=128)
    assert [(c.num_experts, c.num_codes) for c in cases] == [(16, 64), (16, 16), (64, 64),
                                                             (256, 256)]  # fmt: skip
    assert {c.num_tokens for c in cases} == {128}
    assert left_out == ["num_codes=64 < num_experts=256"]


def test_an_empty_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing is left to measure: num_codes=4"):
        layer_cases([8], [4], ["zipf"])


def test_lists_are_parsed() -> None:
    assert parse_numbers("16,64", "--x") == [16, 64]
    assert parse_codes("N,64,N") == [None, 64, None]
    assert parse_choices("zipf,one-hot", "--routing", ["zipf", "one-hot"]) == ["zipf", "one-hot"]


@pytest.mark.parametrize("text", ["", "8,", "a", "8;9", "0", "-1", "1.5"])
def test_a_wrong_list_of_numbers_names_its_option(text: str) -> None:
    with pytest.raises(ValueError, match="--num-experts"):
        parse_numbers(text, "--num-experts")


def test_a_wrong_name_lists_the_legal_ones() -> None:
    with pytest.raises(ValueError, match="'fwd': choose from forward, forward_backward"):
        parse_choices("forward,fwd", "--passes", ["forward", "forward_backward"])


def test_repeats_must_give_deciles() -> None:
    check_repeats(3, 0)
    with pytest.raises(ValueError, match="--repeats 2"):
        check_repeats(2, 0)
    with pytest.raises(ValueError, match="--warmup -1"):
        check_repeats(3, -1)
