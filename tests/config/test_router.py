"""Settings of the routers: who takes which, and what goes together."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqmoe_megatron import registry
from vqmoe_megatron.config import RouterConfig
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.layout import layout_errors

NONE = "model.moe_router_load_balancing_type=none"
PARITY = Path(__file__).resolve().parents[2] / "recipes" / "parity.yaml"


def errors(*overrides: str) -> list[str]:
    return layout_errors(load_recipe(PARITY, list(overrides)), 1, "cpu")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["router.low_dim=4"], "router.low_dim=4 with model.moe_router=topk: it has no such"),
        (
            ["model.moe_router=x_moe", "router.eval_topk=2"],
            "it takes initial_temperature, low_dim, variant",
        ),
        (["model.moe_router=x_moe", "router.low_dim=65"], "low_dim <= model.hidden_size fails: 65"),
        (
            ["model.moe_router=smoe_dropout", NONE],
            "<= model.moe_router_topk fails: 4 > 2; .* as published to all 8",
        ),
        (
            ["model.moe_router=smoe_dropout", NONE, "router.min_topk=1", "router.eval_topk=9"],
            "router.eval_topk <= model.num_moe_experts fails: 9 > 8",
        ),
        (["model.moe_router=stable_moe"], "a token has one expert"),
        (
            [
                *("model.moe_router=stable_moe", "model.moe_router_topk=1"),
                "model.moe_router_load_balancing_type=global_aux_loss",
            ],
            "a balance loss of its own",
        ),
        (
            ["model.moe_router=stable_moe", "router.variant=released", "router.light_dim=8"],
            "the release has one stage",
        ),
        (["model.moe_router=x_moe", "vq.path=filled"], "use moe_router=topk, or another path"),
        (
            ["model.moe_router=x_moe", "train.engine=deepspeed"],
            "train.engine=deepspeed knows moe_router=topk only",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    import re

    found = errors(*overrides)
    assert any(re.search(message, error) for error in found), found


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.moe_router=switch"], "Switch sends a token to one expert; use 1"),
        (["model.moe_router=hash", "model.moe_router_topk=1"], "nothing is learned .* use none"),
        (["model.moe_router=loss_free"], "its biases balance the load"),
        (["model.moe_router=smoe_dropout"], "its router is frozen"),
    ],
)
def test_rules_of_the_model_are_told_when_it_is_read(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(PARITY, overrides)


def test_nulls_are_filled_in_for_those_that_take_them() -> None:
    filled = RouterConfig().for_run("x_moe", 16, 100)
    assert filled == RouterConfig(low_dim=8)
    assert RouterConfig().for_run("topk", 16, 100) == RouterConfig()
    dropout = RouterConfig(min_topk=3).for_run("smoe_dropout", 16, 100)
    assert (dropout.min_topk, dropout.schedule_steps) == (3, 100)
    assert RouterConfig().for_run("stable_moe", 16, 100).stage_1_steps == 10
    assert RouterConfig().for_run("stable_moe", 16, 5).stage_1_steps == 1


def test_every_setting_is_some_routers() -> None:
    taken = set().union(*(registry.takes("router", n) for n in registry.names("router")))
    assert taken == set(RouterConfig.__dataclass_fields__)


def test_words_name_router_and_variant() -> None:
    words = load_recipe(
        PARITY, ["model.moe_router=x_moe", "router.variant=released"]
    ).experts_in_words
    assert "top-2 (released variant) by moe_router=x_moe" in words
    growing = load_recipe(PARITY, ["model.moe_router=smoe_dropout", NONE, "router.min_topk=1"])
    assert "top-1 growing to top-2 in 20 steps" in growing.experts_in_words
