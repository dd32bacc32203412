"""What the section code_memory refuses, by name, and what it says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqmoe_megatron.config import CodeMemoryConfig, VQConfig
from vqmoe_megatron.config.memory_codebooks import hidden_quantizer
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.layout import layout_errors

PARITY = Path(__file__).resolve().parents[2] / "recipes" / "parity.yaml"  # 4 layers, 8 experts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codes": "token"}, "code_memory.codes='token'"),
        ({"values": "learned"}, "code_memory.values='learned'"),
        ({"gate": "sigmoid"}, "code_memory.gate='sigmoid'"),
        ({"exchange": "all"}, "code_memory.exchange='all'"),
        ({"num_rows": -1}, "code_memory.num_rows"),
        ({"max_order": 0}, "code_memory.max_order"),
        ({"max_order": 9}, "code_memory.max_order"),
        ({"context_decay": 1.0}, "code_memory.context_decay"),
        ({"lr_mult": 0.0}, "code_memory.lr_mult"),
        ({"codes": "embedding", "freeze_after_steps": 1}, "use at least 2"),
        (
            {"codes": "embedding", "num_context_codes": 4, "freeze_after_steps": 2},
            "the codes of contexts are there after step 3; use at least 3",
        ),
        ({"num_codes": 64}, "code_memory.num_codes=64 with code_memory.codes=tokens"),
        ({"layers": []}, "rising order"),
        ({"layers": [2, 1]}, "rising order"),
        ({"layers": [1, 1]}, "rising order"),
        ({"num_context_codes": 4, "codes": "hidden"}, "contexts are means of embeddings"),
        ({"num_context_codes": 4}, "code_memory.codes=tokens: contexts are means of embeddings"),
    ],
)
def test_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        CodeMemoryConfig(**{"num_rows": 64, **settings})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "message"),
    [
        (["code_memory.num_rows=60"], 1, "60 % (8 * 1) = 4"),
        (
            ["code_memory.num_rows=8", "parallel.expert_tensor_parallel_size=2"],
            2,
            "8 % (8 * 2) = 8",
        ),
        (
            [
                "code_memory.num_rows=64",
                "code_memory.values=experts",
                "parallel.expert_tensor_parallel_size=2",
            ],
            2,
            "code_memory.values=experts with expert_tensor_parallel_size=2",
        ),
        (["code_memory.num_rows=64", "code_memory.layers=[5]"], 1, "the model has num_layers=4"),
        (
            ["code_memory.num_rows=64", "code_memory.layers=[1,2]", "model.moe_layer_freq=2"],
            1,
            "layers [2] have no experts",
        ),
    ],
)
def test_the_model_rules_out(overrides: list[str], num_ranks: int, message: str) -> None:
    errors = layout_errors(load_recipe(PARITY, overrides), num_ranks, "cpu")
    assert [error for error in errors if message in error], errors


def test_legal_layers_with_dense_ones_between() -> None:
    overrides = ["code_memory.num_rows=64", "code_memory.layers=[1,3]", "model.moe_layer_freq=2"]
    assert layout_errors(load_recipe(PARITY, overrides), 1, "cpu") == []


def test_rules_of_a_memory_that_is_off_do_not_apply() -> None:
    memory = CodeMemoryConfig(num_codes=10**6)
    memory.check_model(4, 7, 3)
    assert not memory.is_on and not memory.carries(1)


@pytest.mark.parametrize("codes", ["embedding", "random"])
def test_with_a_code_for_every_entry_nothing_is_grouped(codes: str) -> None:
    memory = CodeMemoryConfig(num_rows=64, num_codes=256, codes=codes)
    assert memory.groups_entries(257) and memory.moves(257)
    assert not memory.groups_entries(256) and not memory.moves(256)
    contexts = CodeMemoryConfig(num_rows=64, codes="embedding", num_codes=256, num_context_codes=4)
    assert not contexts.groups_entries(256) and contexts.moves(256)


@pytest.mark.parametrize("codes", ["tokens", "frozen_random", "hidden"])
def test_other_codes_do_not_group_the_vocabulary(codes: str) -> None:
    memory = CodeMemoryConfig(num_rows=64, codes=codes)
    assert memory.num_codes == 256 and not memory.moves(1000)


def test_hidden_codes_may_be_fewer_than_experts_and_need_not_move() -> None:
    memory = CodeMemoryConfig(num_rows=64, codes="hidden", num_codes=4, freeze_after_steps=0)
    quantizer = hidden_quantizer(VQConfig(path="continuous"), memory)
    quantizer.check_model(64, 8)
    assert quantizer.freeze_codebook and quantizer.num_codes == 4


def test_addresses_and_layers() -> None:
    memory = CodeMemoryConfig(num_rows=64, codes="embedding", num_context_codes=8, layers=[1, 3])
    assert (memory.num_addresses, memory.rows_per_layer) == (5, 320)
    assert [number for number in range(1, 5) if memory.carries(number)] == [1, 3]
    assert "5 addresses x 64 rows in layers [1, 3]" in memory.in_words
    assert CodeMemoryConfig().in_words == "no code memory (code_memory.num_rows=0)"


def test_defaults_are_what_won_and_what_recipes_say() -> None:
    shipped = load_recipe(PARITY.with_name("quickstart.yaml"), []).code_memory
    assert shipped == CodeMemoryConfig(num_rows=4096, layers=[1, 3])
    assert (shipped.codes, shipped.lr_mult) == ("tokens", 5.0)
    assert not CodeMemoryConfig().is_on


def test_settings_of_a_memory_that_is_off_have_no_effect() -> None:
    off = CodeMemoryConfig(codes="embedding", num_codes=64, lr_mult=1.0, layers=[1])
    assert off.in_effect == CodeMemoryConfig()
    on = CodeMemoryConfig(num_rows=8, codes="embedding", num_codes=64)
    assert on.in_effect is on
