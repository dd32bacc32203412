"""What goes with vq.path=filled, what does not and why, and how it is said."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config import VQConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_input": "blend"}, "vq.path=filled with vq.expert_input=blend"),
        ({"code_input": "learned"}, "vq.code_input=learned: table rows are made of the code"),
        ({"execution": "tokens"}, "vq.execution=tokens: one row per expert and code"),
        ({"code_map": "balanced"}, "vq.code_map=balanced: every expert has a row of every code"),
        ({"straight_through": "group"}, "vq.straight_through=group: the code is a hard choice"),
        ({"norm": "shared"}, "vq.norm=shared: there are no norms"),
        ({"combine": "sigmoid"}, "vq.combine=sigmoid: there is no combine gate"),
        ({"quantizer": "product"}, "vq.quantizer=product: a token reads one row per expert"),
        ({"quantizer": "product", "num_code_slices": 2}, "vq.num_code_slices=2: a token reads"),
        ({"overlap_table": True}, "vq.overlap_table=True: its table is built in the layer"),
        ({"num_fill_experts": 0}, "does nothing that path=continuous does not"),
        (
            {"num_fill_experts": 0, "threshold_routing": True, "fill_values": "direct"},
            "vq.fill_values=direct with vq.num_fill_experts=0: there is no table",
        ),
        (
            {"num_fill_experts": 0, "threshold_routing": True, "table_per_step": True},
            "vq.table_per_step=true is about the table of code space",
        ),
        ({"num_fill_experts": -1}, "vq.num_fill_experts=-1 must be at least 0"),
    ],
)
def test_what_does_not_compose_is_refused_with_the_reason(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VQConfig(path="filled", **changes)


@pytest.mark.parametrize("path", ["dual", "discrete", "continuous"])
@pytest.mark.parametrize(
    "changes", [{"num_fill_experts": 2}, {"fill_values": "direct"}, {"threshold_routing": True}]
)
def test_keys_of_fill_are_refused_elsewhere(path: str, changes: dict) -> None:
    (name,) = changes
    with pytest.raises(ValueError, match=f"vq.{name}=.* is for vq.path=filled, but vq.path={path}"):
        VQConfig(path=path, **changes)


def test_more_experts_than_there_are_cannot_answer() -> None:
    VQConfig(path="filled", num_fill_experts=8).check_model(16, 8)
    with pytest.raises(ValueError, match="vq.num_fill_experts <= num_moe_experts fails: 9 > 8"):
        VQConfig(path="filled", num_fill_experts=9).check_model(16, 8)


def test_one_expert_has_none_beside_it() -> None:
    with pytest.raises(ValueError, match="vq.path=filled with num_moe_experts=1"):
        VQConfig(path="filled").check_model(16, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "the others answer by its code: 16 rows per expert, one table per microbatch"),
        ({"num_fill_experts": 3}, "others among the 3 most likely answer by its code"),
        ({"fill_values": "direct", "table_per_step": True}, "learned directly, one table per step"),
        ({"fill_values": "detached"}, "without gradient into the experts"),
        (
            {"threshold_routing": True},
            "exceeds a moving threshold .one expert per token on average",
        ),
        ({"threshold_routing": True, "num_fill_experts": 0}, "no fill .vq.num_fill_experts=0"),
    ],
)
def test_it_is_said_in_words(changes: dict, words: str) -> None:
    import re

    assert re.search(words, VQConfig(path="filled", num_codes=16, **changes).execution_in_words)
