"""Every numeric key has a legal range, and what lies outside of it is refused with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from vqmoe_megatron.config import ModelConfig, RunConfig, VQConfig
from vqmoe_megatron.config.checks import check_settings
from vqmoe_megatron.config.declared_types import declared_types, is_numeric
from vqmoe_megatron.config.ranges import LEGAL_RANGES, Range, range_problem
from vqmoe_megatron.config.recipe import load_recipe

SECTIONS = declared_types(RunConfig)
HUGE = 10**40  # more than fp32 holds


def numeric_keys(sections: dict[str, type]) -> set[str]:
    """Every field that may hold a number, as ``section.name``."""
    return {
        f"{section}.{name}"
        for section, section_type in sections.items()
        for name, hint in declared_types(section_type).items()
        if is_numeric(hint)
    }


def section_of(key: str) -> tuple[type, str]:
    section, name = key.split(".")
    return SECTIONS[section], name


def is_whole(key: str) -> bool:
    section_type, name = section_of(key)
    return "float" not in str(section_type.__annotations__[name])


def is_list(key: str) -> bool:
    section_type, name = section_of(key)
    return "list[" in str(section_type.__annotations__[name])


def written(key: str, number: float) -> object:
    """The number as the key holds it: by itself, or in a list."""
    return [number] if is_list(key) else number


def outside(key: str) -> list[float]:
    """Numbers of the key's type just out of its range, and far."""
    legal = LEGAL_RANGES[key]
    found: list[float] = [HUGE, -HUGE] if is_whole(key) else [HUGE, -HUGE, 1e39, -1e300]
    for border, is_out, end in (
        (legal.low, legal.without_low, -math.inf),
        (legal.high, legal.without_high, math.inf),
    ):
        beyond = border + (1 if end > 0 else -1) if is_whole(key) else math.nextafter(border, end)
        found.append(border if is_out else beyond)
    found += [legal.low - 10**9, legal.high + 10**13]
    return found


@dataclass
class Unclassified:
    """What the comparison must see in a section, and what is no number."""

    count: int = 1
    rate: float | None = None
    sizes: list[int] | None = None
    shares: tuple[float, ...] = ()
    flag: bool = False
    names: list[str] | None = None


def test_the_table_is_the_numeric_fields_of_the_sections() -> None:
    assert set(LEGAL_RANGES) == numeric_keys(SECTIONS)


def test_a_new_numeric_field_of_any_form_is_seen() -> None:
    assert numeric_keys({"new": Unclassified}) == {
        "new.count",
        "new.rate",
        "new.sizes",
        "new.shares",
    }


def test_a_number_out_of_range_is_refused_with_key_value_and_range() -> None:
    for key, value in [(name, value) for name in LEGAL_RANGES for value in outside(name)]:
        section_type, name = section_of(key)
        with pytest.raises(ValueError) as caught:
            section_type(**{name: written(key, value)})
        assert str(caught.value).startswith(f"{key}={written(key, value)} must be ")
        assert str(caught.value).endswith(str(LEGAL_RANGES[key]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True, "1", [1]])
def test_what_is_no_finite_number_is_refused(value: object) -> None:
    for key in LEGAL_RANGES:
        section_type, name = section_of(key)
        if is_list(key) and value == [1]:
            continue
        with pytest.raises(ValueError, match=key) as caught:
            section_type(**{name: value})
        assert str(LEGAL_RANGES[key]) in str(caught.value)


@pytest.mark.parametrize("key", LEGAL_RANGES)
def test_a_recipe_is_refused_with_the_origin_of_the_number(key: str, tmp_path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("{}")
    section, name = key.split(".")
    for value in (written(key, number) for number in outside(key)):
        with pytest.raises(ValueError) as caught:
            load_recipe(path, [f"{key}={value}"])
        assert f"{key}=" in str(caught.value) and f"(override '{key}={value}')" in str(caught.value)
    path.write_text(f"{section}:\n  {name}: {written(key, HUGE)}\n")
    with pytest.raises(ValueError, match=rf"{key}=.* must be .* \({path}:2\)"):
        load_recipe(path, [])


def test_borders_belong_to_the_range_unless_said_otherwise() -> None:
    for key, legal in LEGAL_RANGES.items():
        assert (range_problem(key, legal.low) is None) is not legal.without_low, key
        assert (range_problem(key, legal.high) is None) is not legal.without_high, key


def test_every_number_has_a_lowest_and_a_highest() -> None:
    for key, legal in LEGAL_RANGES.items():
        assert -math.inf < legal.low < legal.high < math.inf, key


@pytest.mark.parametrize(
    ("legal", "words"),
    [
        (Range(1), "at least 1"),
        (Range(0, without_low=True), "above 0"),
        (Range(0, 1, without_high=True), "at least 0 and below 1"),
        (Range(0, 1, True, True), "above 0 and below 1"),
        (Range(high=7), "at most 7"),
        (Range(), ""),
    ],
)
def test_a_range_in_words(legal: Range, words: str) -> None:
    assert str(legal) == words


@pytest.mark.parametrize("num_digits", [500, 5000])
def test_a_number_of_many_digits_is_named_and_not_repeated(num_digits: int, tmp_path) -> None:
    number = 10**num_digits
    with pytest.raises(ValueError, match="^vq.num_codes=") as caught:
        VQConfig(num_codes=number)
    assert len(str(caught.value)) < 300
    path = tmp_path / "r.yaml"
    path.write_text(f"vq:\n  num_codes: 1{'0' * num_digits}\n")
    with pytest.raises(ValueError) as caught:
        load_recipe(path, [])
    assert f"{path}:2" in str(caught.value) or "is not valid YAML: line 2" in str(caught.value)
    assert len(str(caught.value)) < 400
    path.write_text("{}")
    with pytest.raises(ValueError, match="override 'vq.num_codes=10000") as caught:
        load_recipe(path, [f"vq.num_codes=1{'0' * num_digits}"])
    assert len(str(caught.value)) < 800


def test_every_number_of_a_list_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEGAL_RANGES, "new.sizes", Range(2))
    monkeypatch.setitem(LEGAL_RANGES, "new.shares", Range(0, 1))
    assert range_problem("new.sizes", [2, 3, None]) is None
    assert range_problem("new.sizes", [2, 1]) == "new.sizes=[2, 1] must be at least 2"
    nan = range_problem("new.shares", (0.5, math.nan))
    assert nan == "new.shares=(0.5, nan) must be a finite number in fp32, at least 0 and at most 1"


def test_all_problems_of_a_section_come_together() -> None:
    with pytest.raises(ValueError) as caught:
        ModelConfig(num_layers=0, init_method_std=-1, bf16=1)  # type: ignore[arg-type]
    for text in ("num_layers=0", "init_method_std=-1", "model.bf16: expected true or false"):
        assert text in str(caught.value)


def test_settings_that_are_no_numbers_have_their_type_too() -> None:
    with pytest.raises(ValueError, match="vq.freeze_codebook: expected true or false, got str"):
        VQConfig(freeze_codebook="false")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="new.names: expected a list of str or null, got list"):
        check_settings("new", Unclassified(names=[1]))  # type: ignore[list-item]
