"""Layer specs: Megatron's transformer layer with VQMoE in the place of its MLP.

On CUDA with Transformer Engine the other modules are Transformer Engine's, elsewhere
Megatron-core's own. :func:`spec_backend` says which and why.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.balanced_router import BalancedRouter
from vqmoe_megatron.moe.grouped_experts import GroupedExperts
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.norms import ParallelNorm

CONFIG_VARIABLE = "VQMOE_CONFIG"


def spec_backend() -> tuple[str, str]:
    """Return ``("transformer_engine" | "local", reason)``."""
    if not torch.cuda.is_available():
        return "local", "no CUDA device: Transformer Engine's kernels need one"
    if importlib.util.find_spec("transformer_engine") is None:
        return "local", "Transformer Engine is not installed"
    return "transformer_engine", "CUDA device and Transformer Engine are here"


def get_vqmoe_layer_spec(
    config: TransformerConfig | None = None, vq: VQConfig | None = None, seed: int = 1234
) -> ModuleSpec:
    """Build the spec of one transformer layer whose MLP is a :class:`VQMoELayer`.

    Args:
        config: checked against ``vq`` when given; the layer receives its own from Megatron.
        vq: the layer's settings; None takes the defaults, with K = 4 N.
        seed: of codebook initialisation and revival, the same on all ranks.

    Raises:
        ValueError: when ``vq`` does not fit ``config``.
    """
    if config is not None and vq is not None:
        vq.check_model(config.hidden_size, config.num_moe_experts)
    spec = _dense_layer_spec()
    spec.submodules.mlp = ModuleSpec(
        module=VQMoELayer,
        params={"vq": vq, "seed": seed},
        submodules=MoESubmodules(router=BalancedRouter, experts=ModuleSpec(module=GroupedExperts)),
    )
    if spec_backend()[0] == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        spec.submodules.pre_mlp_layernorm = TENorm  # the dense spec fuses it into fc1
    else:
        # Only dense layers rename their norms to Transformer Engine's fused keys.
        spec.submodules.sharded_state_dict_keys_map = {}
    return spec


def get_vqmoe_block_spec(
    config: TransformerConfig, vq: VQConfig, seed: int = 1234, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Build this pipeline stage's layers: VQMoE every ``moe_layer_freq`` layers, dense between.

    Raises:
        ValueError: when ``vq`` does not fit ``config``.
    """
    moe_layer = get_vqmoe_layer_spec(config, vq, seed)
    dense_layer = _dense_layer_spec()
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = [
        copy.copy(moe_layer if number % config.moe_layer_freq == 0 else dense_layer)
        for number in range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    ]
    if spec_backend()[0] == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=ParallelNorm)


def layer_spec_from_environment() -> ModuleSpec:
    """Build the object behind Megatron-LM's ``--spec vqmoe_megatron.moe vqmoe_layer_spec``.

    Megatron-LM imports an object, not a function, so its settings come from the ``vq`` section of
    the YAML file named by ``VQMOE_CONFIG``; unset, the defaults with K = 4 N apply.

    Raises:
        ValueError: when the file is missing or not a legal recipe.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        return get_vqmoe_layer_spec()
    from vqmoe_megatron.recipe import load_recipe

    recipe = load_recipe(Path(path), [])
    return get_vqmoe_layer_spec(vq=recipe.vq, seed=recipe.train.seed)


def _dense_layer_spec() -> ModuleSpec:
    if spec_backend()[0] == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec()
    spec.submodules.input_layernorm = ParallelNorm
    spec.submodules.pre_mlp_layernorm = ParallelNorm
    return spec
