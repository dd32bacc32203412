"""Overrides of a study file: both forms are the same texts, what is neither is refused."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.study.override_texts import key_of, override_texts


def read(content) -> tuple[tuple[str, ...] | None, list[str]]:
    problems: list[str] = []
    return override_texts("grid.arm.a", content, problems), problems


def test_a_mapping_is_the_list_of_its_lines() -> None:
    mapping = {"vq.path": "continuous", "model.moe_router_topk": 2, "vq.table_per_step": False}
    texts = ("vq.path=continuous", "model.moe_router_topk=2", "vq.table_per_step=false")
    assert read(mapping) == read(list(texts)) == (texts, [])
    assert read(None) == read({}) == read([]) == ((), [])
    assert read({"vq.num_codes": "4 * experts"})[0] == ("vq.num_codes=4 * experts",)


def test_values_reach_the_recipe_as_yaml_reads_them(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("train:\n  seed: 3\n")
    mapping = {
        "data.path": "null",  # a text that looks like no value
        "data.cache_dir": None,
        "optimizer.min_lr": 1e-05,
        "tracking.tags": ["a=1", "b=x y"],
    }
    config = load_recipe(tmp_path / "recipe.yaml", list(read(mapping)[0]))
    assert config.data.path == "null" and config.data.cache_dir is None
    assert config.optimizer.min_lr == 1e-05 and config.tracking.tags == ["a=1", "b=x y"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("vq.path=dual", "must be a list of overrides"),
        ([{"vq.path": "dual"}], "must be a list of overrides"),
        ({"vq": {"path": "dual"}}, "grid.arm.a.vq must be one value"),
        ({"vq.path=dual": None}, "in a mapping write key: value"),
    ],
)
def test_what_is_neither_is_refused(content, says) -> None:
    texts, (problem,) = read(content)
    assert texts is None and says in problem


def test_the_key_of_a_text() -> None:
    assert key_of(" vq.path = a=b") == "vq.path"
