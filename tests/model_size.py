"""How many parameters a model really has, counted in a rank; for tests."""

from __future__ import annotations


def count_parameters(recipe: str, overrides: list[str]) -> int:
    """Build the whole model on one rank and count the elements of its parameters."""
    from pathlib import Path

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.engines.megatron.model import build_model, build_transformer_config
    from vqmoe_megatron.plan.layout import ParallelLayout

    config = load_recipe(Path(recipe), ["model.vocab_size=256", *overrides])
    layout = ParallelLayout.from_config(config, 1)
    (chunk,) = build_model(config, build_transformer_config(config, layout), layout)
    return sum(parameter.numel() for parameter in chunk.parameters())
