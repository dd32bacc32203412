"""Texts that nothing can store, and paths that name no place, are refused by their key."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config.declared_types import alternatives
from vqmoe_megatron.config.recipe import LEGAL_TYPES, load_recipe
from vqmoe_megatron.config.texts import PATH_KEYS, text_problem

TEXT_KEYS = [key for key, hint in LEGAL_TYPES.items() if str in alternatives(hint)]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("{}")
    return path


@pytest.mark.parametrize("key", TEXT_KEYS)
@pytest.mark.parametrize(
    ("text", "problem"),
    [("a\0b", r"='a\x00b' holds a NUL"), ("a\udcff", r"='a\udcff' is not valid Unicode")],
)
def test_no_text_key_takes_what_cannot_be_stored(recipe, key, text, problem) -> None:
    with pytest.raises(ValueError) as caught:
        load_recipe(recipe, [f"{key}={text}"])
    assert f"{key}{problem}" in str(caught.value)


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("''", "is empty"),
        ("'  '", "is empty"),
        ("~/runs", "is not expanded here; write /home/me/runs, or ./~/runs"),
        ("~", None),  # null of YAML, as for every text
        ("x" * 256, "its longest name 256; at most 3,840 and 255"),
        ("é" * 128, "256 bytes"),
        ("/".join(["x" * 99] * 40), "is too long: 3,999 bytes"),
        ("x" * 255, None),
        ("a~/b", None),
        ("./~/b", None),
    ],
)
def test_a_path_names_a_place(recipe, monkeypatch, key, path, problem) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    if path == "~" and key in ("data.path", "train.output_dir"):
        problem = "expected str, got null"
    try:
        load_recipe(recipe, [f"{key}={path}"])
    except ValueError as error:
        assert problem is not None and f"{key}" in str(error) and problem in str(error)
        assert "\n" not in str(error)
    else:
        assert problem is None


def test_what_is_no_text_has_no_problem_here() -> None:
    assert text_problem("data.path", None) is None and text_problem("data.path", 3) is None
    assert text_problem("tracking.run_name", "~") is None
