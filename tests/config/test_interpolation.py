"""``${...}`` is resolved, and a recipe without one is read as one with it."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.config.interpolation import Unresolved, resolved
from vqmoe_megatron.config.recipe import apply_overrides, flatten_config

PLAIN = {
    "model.num_layers": 4,
    "optimizer.lr": 0.5,
    "model.bf16": True,
    "checkpoint.load": None,
    "model.recompute_modules": ["moe", "mlp"],
    "train.output_dir": "runs/a: b #1",
}


def test_values_are_the_same_whether_or_not_another_one_is_a_reference():
    marked = resolved({**PLAIN, "tracking.run_name": "x${model.num_layers}"})
    assert marked.pop("tracking.run_name") == "x4"
    plain = resolved(PLAIN)
    assert marked == plain == PLAIN
    assert {key: type(value) for key, value in marked.items()} == {
        key: type(value) for key, value in plain.items()
    }


@pytest.mark.parametrize("where", [lambda text: text, lambda text: [1, text]], ids=["bare", "list"])
@pytest.mark.parametrize("text", ["${model.num_layer}", "${model", "${train.seed}"])
def test_what_cannot_be_resolved_says_why_and_hides_nothing_else(text, where):
    found = resolved({**PLAIN, "train.seed": where(text)})
    assert isinstance(found.pop("train.seed"), Unresolved)
    assert found == PLAIN


def test_a_value_still_to_be_given_is_none():
    assert "Missing mandatory value" in resolved({"train.seed": "???"})["train.seed"].why


def test_a_list_that_was_overridden_belongs_to_one_recipe():
    text = ["model.recompute_granularity=selective", "model.recompute_modules=[moe]"]
    one, other = (apply_overrides(RunConfig(), text) for _ in range(2))
    assert flatten_config(one) == flatten_config(other)
    one.model.recompute_modules.append("mlp")
    assert other.model.recompute_modules == ["moe"]
    assert apply_overrides(RunConfig(), text).model.recompute_modules == ["moe"]
