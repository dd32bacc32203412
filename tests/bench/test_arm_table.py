"""The arms: letters of the contract, comparable within a function, chosen by letter and pass."""

from __future__ import annotations

import pytest

from vqmoe_megatron.bench.arm_table import ARMS, choose_arms, layer_shape
from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.config.vq import VQConfig

CASE = LayerCase(8, 32, 100, 64, 96, dtype="bfloat16", norm="separate")


def test_the_contract_s_letters_are_there() -> None:
    assert {"A", "A2", "B", "C", "D", "D0", "E", "E2", "F", "F2", "G1", "G8", "G0", "H", "P8"} <= (
        set(ARMS)
    )


@pytest.mark.parametrize("letter", list(ARMS))
def test_an_arm_is_legal_and_runs_somewhere(letter: str) -> None:
    spec = ARMS[letter]
    VQConfig(num_codes=16, **spec.vq)
    assert spec.passes
    assert spec.token_gradient in ("exact", "group", "none")


def test_every_function_but_top2_and_product_has_arms_to_compare() -> None:
    by_function: dict[str, list[str]] = {}
    for letter, spec in ARMS.items():
        by_function.setdefault(spec.function, []).append(letter)
    alone = {function for function, letters in by_function.items() if len(letters) == 1}
    assert alone == {"top2", "product"}  # the oracle is what these two are held against


def test_token_gradient_says_what_straight_through_does() -> None:
    for spec in ARMS.values():
        if spec.kind == "vqmoe" and spec.vq.get("path") != "continuous":
            vq = VQConfig(**spec.vq)
            expected = {"token": "exact", "group": "group", "none": "none"}[vq.straight_through]
            assert spec.token_gradient == expected


def test_arms_are_chosen_by_letter_and_pass() -> None:
    assert list(choose_arms(["E", "A", "F"], "forward", 64)) == ["A", "E"]
    assert list(choose_arms(["E", "A", "F", "G0"], "forward_backward", 64)) == ["A", "E", "F"]
    everything = {*choose_arms([], "forward", 64), *choose_arms([], "forward_backward", 64)}
    assert everything == set(ARMS)


def test_an_unknown_letter_and_an_indivisible_width_are_refused() -> None:
    with pytest.raises(ValueError, match="--arms 'Z': choose from A, "):
        choose_arms(["Z"], "forward", 64)
    with pytest.raises(ValueError, match="P8.*12 % 8 = 4"):
        choose_arms([], "forward", 12)


def test_a_title_tells_the_microbatches() -> None:
    assert ARMS["G1"].title == "table per step"
    assert ARMS["G8"].title == "table per step, 8 microbatches"


@pytest.mark.parametrize("letter", [a for a, spec in ARMS.items() if spec.kind == "vqmoe"])
def test_the_cost_model_is_told_the_arm_s_settings(letter: str) -> None:
    spec = ARMS[letter]
    shape = layer_shape(CASE, spec, {"expert_model_parallel_size": 4})
    for name, value in spec.vq.items():
        assert getattr(shape.vq, name) == value, name
    assert shape.bytes_per_element == 2
    assert shape.num_local_tokens == 100
    assert shape.expert_model_parallel_size == 4
    assert shape.vq.norm == "separate"
    assert shape.vq.num_codes == CASE.num_codes
    assert shape.num_microbatches == spec.num_microbatches
