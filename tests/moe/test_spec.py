"""The layer specs: what Megatron-LM's --spec imports, which layers are VQMoE, that they build."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqmoe_megatron.config import VQConfig

ROOT = Path(__file__).resolve().parents[2]


def test_spec_object_takes_its_settings_from_the_environment(monkeypatch, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("vq: {num_codes: 24, combine: sigmoid}\ntrain: {seed: 7}\n")
    monkeypatch.setenv("VQMOE_CONFIG", str(recipe))
    from vqmoe_megatron import moe

    params = moe.vqmoe_layer_spec.submodules.mlp.params
    assert params["vq"] == VQConfig(num_codes=24, combine="sigmoid")
    assert params["seed"] == 7


def test_spec_object_without_settings_leaves_them_to_the_layer(monkeypatch) -> None:
    monkeypatch.delenv("VQMOE_CONFIG", raising=False)
    from vqmoe_megatron import moe

    assert moe.vqmoe_layer_spec.submodules.mlp.params["vq"] is None


def test_a_missing_settings_file_is_named(monkeypatch) -> None:
    monkeypatch.setenv("VQMOE_CONFIG", "no/such/recipe.yaml")
    from vqmoe_megatron import moe

    with pytest.raises(ValueError, match="no/such/recipe.yaml"):
        _ = moe.vqmoe_layer_spec


def test_an_unknown_attribute_is_still_an_error() -> None:
    from vqmoe_megatron import moe

    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = moe.no_such_thing


def build_and_step(freq: int, use_object: bool) -> dict:
    """In a rank: a GPTModel from the spec; which layers are VQMoE, and which got gradients."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from tiny_layer import HIDDEN, transformer_config

    from vqmoe_megatron.moe import VQMoELayer, get_vqmoe_block_spec, vqmoe_layer_spec

    config = transformer_config(num_layers=4, moe_layer_freq=freq, ffn_hidden_size=2 * HIDDEN)
    spec = vqmoe_layer_spec if use_object else get_vqmoe_block_spec(config, VQConfig(num_codes=8))
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=8)
    tokens = torch.arange(16).view(2, 8)
    loss = model(tokens, torch.arange(8).expand(2, -1), None, labels=tokens).mean()
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    kinds = [isinstance(layer.mlp, VQMoELayer) for layer in model.decoder.layers]
    numbers = [m.layer_number for m in model.modules() if isinstance(m, VQMoELayer)]
    return {"kinds": kinds, "numbers": numbers, "missing": missing, "loss": float(loss)}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("freq", "use_object", "kinds", "numbers"),
    [
        (1, True, [True] * 4, [1, 2, 3, 4]),
        (1, False, [True] * 4, [1, 2, 3, 4]),
        (2, False, [True, False, True, False], [1, 3]),
    ],
)
def test_a_model_builds_and_trains(ranks, freq, use_object, kinds, numbers) -> None:
    (found,) = ranks(1).run(build_and_step, freq, use_object)
    assert found["kinds"] == kinds
    assert found["numbers"] == numbers
    assert found["missing"] == []
    assert 0 < found["loss"] < 100
