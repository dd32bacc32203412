"""The layer specs: what Megatron-LM's --spec imports, which layers are VQMoE, that they build."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqmoe_megatron.config import VQConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.distributed
def test_megatron_imports_the_object(ranks) -> None:
    assert ranks(1).run(imported_by_megatron, []) == ["ModuleSpec"]


def imported_by_megatron(_nothing: list) -> str:
    """In a rank: what Megatron-LM's --spec makes of the two names."""
    from megatron.core.transformer.spec_utils import import_module

    return type(import_module(("vqmoe_megatron.moe", "vqmoe_layer_spec"))).__name__


def layer_from_environment(path: str, changes: dict) -> list:
    """In a rank: the settings of the layer that Megatron builds from the object, or the error."""
    import os

    from megatron.core.transformer.spec_utils import build_module, import_module
    from tiny_layer import transformer_config

    spec = import_module(("vqmoe_megatron.moe", "vqmoe_layer_spec"))
    os.environ["VQMOE_CONFIG"] = path
    try:
        layer = build_module(spec.submodules.mlp, config=transformer_config(**changes))
    except ValueError as error:
        return [str(error)]
    finally:
        del os.environ["VQMOE_CONFIG"]
    return [layer.vq.num_codes, layer.vq.combine, layer.assigner.base_seed]


@pytest.mark.distributed
def test_layers_take_their_settings_from_the_environment(ranks, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("vq: {num_codes: 24, combine: sigmoid}\ntrain: {seed: 7}\n")
    assert ranks(1).run(layer_from_environment, str(recipe), {}) == [[24, "sigmoid", 7]]
    assert ranks(1).run(layer_from_environment, "", {}) == [[16, "softmax", 1234]]  # K = 4 N


@pytest.mark.distributed
def test_a_code_memory_needs_more_than_a_layer(ranks, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("code_memory: {num_rows: 64}\n")
    ((text,),) = ranks(1).run(layer_from_environment, str(recipe), {})
    assert "code_memory.num_rows=0" in text and "attach_code_stream" in text


@pytest.mark.distributed
def test_a_missing_settings_file_is_named(ranks) -> None:
    ((text,),) = ranks(1).run(layer_from_environment, "no/such/recipe.yaml", {})
    assert "no/such/recipe.yaml" in text


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["qk_layernorm", "qk_l2_norm"])
def test_an_attention_that_the_object_lacks_is_refused(ranks, name: str) -> None:
    ((text,),) = ranks(1).run(layer_from_environment, "", {name: True})
    assert f"would pass over {name}=True" in text


def test_an_unknown_attribute_is_still_an_error() -> None:
    from vqmoe_megatron import moe

    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = moe.no_such_thing


def build_and_step(freq: object, use_object: bool, changes: dict) -> dict:
    """In a rank: a GPTModel from the spec; which layers are VQMoE, and which got gradients."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from tiny_layer import HIDDEN, transformer_config

    from vqmoe_megatron.moe import VQMoELayer, get_vqmoe_block_spec, vqmoe_layer_spec

    config = transformer_config(
        num_layers=4, moe_layer_freq=freq, ffn_hidden_size=2 * HIDDEN, **changes
    )
    spec = vqmoe_layer_spec if use_object else get_vqmoe_block_spec(config, VQConfig(num_codes=8))
    model = GPTModel(config, spec, vocab_size=32, max_sequence_length=8)
    tokens = torch.arange(16).view(2, 8)
    loss = model(tokens, torch.arange(8).expand(2, -1), None, labels=tokens).mean()
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    kinds = [isinstance(layer.mlp, VQMoELayer) for layer in model.decoder.layers]
    numbers = [m.layer_number for m in model.modules() if isinstance(m, VQMoELayer)]
    names = [name for name, _ in model.named_parameters()]
    return {
        "kinds": kinds,
        "numbers": numbers,
        "missing": missing,
        "loss": float(loss),
        "qk_norms": sum("q_layernorm" in name for name in names),
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("freq", "use_object", "changes", "kinds", "numbers"),
    [
        (1, True, {}, [True] * 4, [1, 2, 3, 4]),
        (1, False, {}, [True] * 4, [1, 2, 3, 4]),
        (2, False, {}, [True, False, True, False], [1, 3]),
        ([0, 1, 1, 0], False, {}, [False, True, True, False], [2, 3]),
        (1, False, {"qk_layernorm": True}, [True] * 4, [1, 2, 3, 4]),
    ],
)
def test_a_model_builds_and_trains(ranks, freq, use_object, changes, kinds, numbers) -> None:
    (found,) = ranks(1).run(build_and_step, freq, use_object, changes)
    assert found["kinds"] == kinds
    assert found["numbers"] == numbers
    assert found["missing"] == []
    assert 0 < found["loss"] < 100
    assert found["qk_norms"] == (8 if changes else 0)


def frequency_with_the_object(freq: object) -> str:
    """In a rank: what a model is told whose layers should not all be VQMoE layers."""
    try:
        build_and_step(freq, True, {})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.distributed
@pytest.mark.parametrize("freq", [2, [1, 0, 1, 1]])
def test_a_layer_that_should_be_dense_is_refused(ranks, freq) -> None:
    (text,) = ranks(1).run(frequency_with_the_object, freq)
    assert "makes layer 2 dense" in text
    assert "get_vqmoe_block_spec" in text


def stages_with_layers(freq: object, stages: int) -> bool:
    """In a rank: whether every stage of a model of 4 layers would hold a VQMoE layer."""
    from tiny_layer import transformer_config

    from vqmoe_megatron.moe.spec import are_on_every_stage

    config = transformer_config(num_layers=4, moe_layer_freq=freq)
    config.pipeline_model_parallel_size = stages
    return are_on_every_stage(config)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("freq", "stages", "expected"),
    [(1, 4, True), (2, 2, True), (2, 4, False), ([0, 0, 1, 1], 2, False), ([0, 1, 0, 1], 2, True)],
)
def test_stages_without_a_vqmoe_layer_are_known(ranks, freq, stages, expected) -> None:
    assert ranks(1).run(stages_with_layers, freq, stages) == [expected]
