"""Recipes without a Hugging Face form say so."""

from __future__ import annotations

import pytest

from vqmoe_megatron.config import ModelConfig, RunConfig
from vqmoe_megatron.hf.rules import check_has_hf_form


def test_relative_attention_has_none() -> None:
    check_has_hf_form(RunConfig())
    model = ModelConfig(attention="transformer_xl", position_embedding_type="relative")
    with pytest.raises(ValueError, match="model.attention=transformer_xl has no Hugging Face form"):
        check_has_hf_form(RunConfig(model=model))
