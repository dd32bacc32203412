"""Attention, positions and memory that do not go together."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config import ModelConfig


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention": "linear"}, "attention"),
        ({"attention": "transformer_xl"}, "set model.position_embedding_type=relative"),
        ({"position_embedding_type": "relative"}, "set model.attention=transformer_xl, or use"),
        ({"memory_length_tokens": 5}, "only model.attention=transformer_xl remembers"),
        ({"memory_length_tokens": -1}, "memory_length_tokens=-1 must be at least 0"),
    ],
)
def test_they_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(**settings)


def test_the_whole_is_legal() -> None:
    settings = {"attention": "transformer_xl", "position_embedding_type": "relative"}
    assert ModelConfig(**settings, memory_length_tokens=7).memory_length_tokens == 7
    assert ModelConfig(**settings).memory_length_tokens == 0
