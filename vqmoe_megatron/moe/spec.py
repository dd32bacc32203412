"""Layer specs: Megatron's transformer layer with VQMoE in the place of its MLP.

``get_vqmoe_layer_spec`` and ``get_vqmoe_block_spec`` are built from a configuration, for callers in
Python. ``vqmoe_layer_spec`` is an object, since Megatron-LM's ``--spec`` imports one.

On CUDA with Transformer Engine the other modules are Transformer Engine's, elsewhere, and with
``transformer_impl=local``, Megatron-core's own; without CUDA the core of attention is torch's
(``cpu_attention``). :func:`spec_backend` says which and why. With ``fp8`` the experts are
Transformer Engine's, too.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.moe.cpu_attention import CpuAttention
from vqmoe_megatron.moe.expert_engine import EngineType, ExpertEngine
from vqmoe_megatron.moe.grouped_experts import GroupedExperts
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.megatron_settings import is_moe_layer
from vqmoe_megatron.moe.memory.path import LayerMemory
from vqmoe_megatron.moe.norms import ParallelNorm
from vqmoe_megatron.moe.post_norm import with_norms_behind
from vqmoe_megatron.moe.routers.builder import DEFAULT_ROUTER, LayerRouter
from vqmoe_megatron.plan.layout import CUT_ATTENTION_ON_CUDA
from vqmoe_megatron.plan.rules import POST_IS_LOCAL, SHARED_NORM_IS_BEHIND
from vqmoe_megatron.runtime.fused_parts import TE_LAYERS
from vqmoe_megatron.runtime.graphs import Graph

CONFIG_VARIABLE = "VQMOE_CONFIG"
DEFAULT_SEED = 1234


def spec_backend(config: TransformerConfig | None = None) -> tuple[str, str]:
    """Return ``("transformer_engine" | "local", reason)``; ``config.transformer_impl`` may ask for
    local modules."""
    if config is not None and config.transformer_impl == "local":
        return "local", "transformer_impl=local"
    if not torch.cuda.is_available():
        return "local", "no CUDA device: Transformer Engine's kernels need one"
    if (obstacle := TE_LAYERS.obstacle()) is not None:
        return "local", obstacle
    return "transformer_engine", "CUDA device and Transformer Engine are here"


def get_vqmoe_layer_spec(
    config: TransformerConfig | None = None,
    vq: VQConfig | None = None,
    seed: int = DEFAULT_SEED,
    router: str | LayerRouter = DEFAULT_ROUTER,
) -> ModuleSpec:
    """Build the spec of one transformer layer whose MLP is a :class:`VQMoELayer`.

    Args:
        config: checked against ``vq``, and its attention built, when given; the layer receives its
            own from Megatron.
        vq: the layer's settings; None takes the defaults, with K = 4 N.
        seed: of codebook initialisation and revival, the same on all ranks.
        router: name of the continuous path's, as the registry knows it, or with its settings.

    Raises:
        ValueError: when ``vq`` does not fit ``config``, or for an unknown router.
    """
    if config is not None and vq is not None:
        vq.check_model(config.hidden_size, config.num_moe_experts)
    return _layer_spec(config, VQMoELayer, {"vq": vq, "seed": seed}, router)


def get_vqmoe_block_spec(
    config: TransformerConfig,
    vq: VQConfig,
    seed: int = DEFAULT_SEED,
    vp_stage: int | None = None,
    engine: EngineType = ExpertEngine,
    router: str | LayerRouter = DEFAULT_ROUTER,
    local_norm: type = ParallelNorm,
    new_graph: Callable[[], Graph] | None = None,
    memory: LayerMemory | None = None,
    norm_placement: str = "pre",
    freeze_router: bool = False,
) -> TransformerBlockSubmodules:
    """Build this pipeline stage's layers: VQMoE every ``moe_layer_freq`` layers, dense between.

    ``engine`` builds the expert engine of every layer; ``router`` is the continuous path's, by name
    or with its settings, and its token stream is to be attached to the model;
    ``local_norm`` builds the norms around attention and MLP where modules are local, for instance
    Megatron's ``FusedLayerNorm``; ``new_graph`` the graphs of the discrete path, None: none;
    ``memory`` the code memory of the layers that carry one, whose stream is to be attached to the
    model (``attach_code_stream``); ``norm_placement`` is pre or post, norms in front of attention
    and MLP or behind their residual sums; ``freeze_router`` leaves routers as they are drawn.

    Raises:
        ValueError: when ``vq`` or ``norm_placement`` does not fit ``config``, or for cut sequences
            that only Transformer Engine could attend to.
    """
    vq.check_model(config.hidden_size, config.num_moe_experts)
    _check_norms(config, vq, norm_placement)
    moe_layer = _layer_spec(config, VQMoELayer, {"vq": vq, "seed": seed}, router, local_norm)
    moe_layer.submodules.mlp.params |= {
        "on_every_stage": are_on_every_stage(config),
        "engine": engine,
        "new_graph": new_graph,
        "freeze_router": freeze_router,
    }
    dense_layer = _dense_layer_spec(config, local_norm)
    if norm_placement == "post":
        is_shared = vq.norm == "shared_with_block"
        moe_layer = with_norms_behind(moe_layer, config, local_norm, is_shared)
        dense_layer = with_norms_behind(dense_layer, config, local_norm, is_shared=False)
    with_memory = _with_memory(moe_layer, memory)

    def layer_at(index: int) -> ModuleSpec:
        if not is_moe_layer(config, index):
            return dense_layer
        carries = memory is not None and memory.settings.carries(index + 1)
        return with_memory if carries else moe_layer

    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    layers = [
        copy.copy(layer_at(index))
        for index in range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    ]
    if spec_backend(config)[0] == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)
    final_norm = local_norm if norm_placement == "pre" else None
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm)


def _check_norms(config: TransformerConfig, vq: VQConfig, norm_placement: str) -> None:
    if norm_placement not in ("pre", "post"):
        raise ValueError(f"norm_placement={norm_placement!r}: choose one of pre, post")
    if norm_placement == "pre" and vq.norm == "shared_with_block":
        raise ValueError(f"vq.norm=shared_with_block with pre: {SHARED_NORM_IS_BEHIND}")
    if norm_placement == "post" and spec_backend(config)[0] != "local":
        raise ValueError(f"norm_placement=post: {POST_IS_LOCAL}")


def _with_memory(layer: ModuleSpec, memory: LayerMemory | None) -> ModuleSpec:
    """The spec of a layer that carries ``memory``."""
    layer, submodules = copy.copy(layer), copy.copy(layer.submodules)
    layer.submodules, mlp = submodules, copy.copy(submodules.mlp)
    submodules.mlp, mlp.params = mlp, mlp.params | {"memory": memory}
    return layer


def are_on_every_stage(config: TransformerConfig) -> bool:
    """Whether every pipeline stage of a model with ``moe_layer_freq`` holds a MoE layer."""
    num_chunks = config.virtual_pipeline_model_parallel_size
    chunks = [None] if num_chunks is None else range(num_chunks)

    def layers_of(stage: int) -> Iterator[int]:
        for chunk in chunks:
            place = {"vp_stage": chunk, "pp_rank": stage}
            first = get_transformer_layer_offset(config, **place)
            yield from range(first, first + get_num_layers_to_build(config, **place))

    return all(
        any(is_moe_layer(config, index) for index in layers_of(stage))
        for stage in range(config.pipeline_model_parallel_size)
    )


class EnvironmentLayer(VQMoELayer):
    """A :class:`VQMoELayer` with settings from the file named by ``VQMOE_CONFIG``.

    They are its ``vq`` section and its ``train.seed``; unset, the defaults with K = 4 N apply.

    Raises:
        ValueError: when the file is missing or not a legal recipe, or the configuration asks for
            another attention than the spec has.
    """

    def __init__(self, config: TransformerConfig, **of_megatron: object) -> None:
        for name in ("qk_layernorm", "qk_l2_norm", "multi_latent_attention"):
            if getattr(config, name):
                raise ValueError(
                    f"vqmoe_layer_spec has Megatron's standard attention and would pass over "
                    f"{name}={getattr(config, name)}; leave it out, or build the model with "
                    "get_vqmoe_block_spec(config, vq)"
                )
        vq, seed = settings_from_environment()
        everywhere = are_on_every_stage(config)
        super().__init__(config, vq=vq, seed=seed, on_every_stage=everywhere, **of_megatron)


def settings_from_environment() -> tuple[VQConfig | None, int]:
    """Codebook settings and seed of the recipe named by ``VQMOE_CONFIG``; without one, defaults.

    Raises:
        ValueError: when the file is missing or not a legal recipe.
    """
    path = os.environ.get(CONFIG_VARIABLE)
    if not path:
        return None, DEFAULT_SEED
    from vqmoe_megatron.config.recipe import load_recipe

    recipe = load_recipe(Path(path), [])
    if recipe.model.moe_router != DEFAULT_ROUTER:
        raise ValueError(
            f"{path}: vqmoe_layer_spec builds layers with Megatron's own router, not with "
            f"model.moe_router={recipe.model.moe_router}; use {DEFAULT_ROUTER}, or build the model "
            "with get_vqmoe_block_spec(config, vq, router=...)"
        )
    if recipe.code_memory.is_on:
        raise ValueError(
            f"{path}: vqmoe_layer_spec builds layers alone, and code memory needs the model's "
            "token ids; set code_memory.num_rows=0, or build the model with "
            "get_vqmoe_block_spec(config, vq, memory=...) and attach_code_stream"
        )
    return recipe.vq, recipe.train.seed


def _layer_spec(
    config: TransformerConfig | None,
    layer: type[VQMoELayer],
    params: dict,
    router: str | LayerRouter,
    local_norm: type = ParallelNorm,
) -> ModuleSpec:
    router = LayerRouter(router) if isinstance(router, str) else router
    spec = _dense_layer_spec(config, local_norm)
    spec.submodules.mlp = ModuleSpec(
        module=layer,
        params=params,
        submodules=MoESubmodules(
            router=router.builder(params.get("seed", DEFAULT_SEED)),
            experts=_experts_spec(config),
            shared_experts=_shared_experts_spec(config),
        ),
    )
    if spec_backend(config)[0] == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        spec.submodules.pre_mlp_layernorm = TENorm  # the dense spec fuses it into fc1
    else:
        # Only dense layers rename their norms to Transformer Engine's fused keys.
        spec.submodules.sharded_state_dict_keys_map = {}
    return spec


def _experts_spec(config: TransformerConfig | None) -> ModuleSpec:
    """Grouped experts of torch's GEMM; for fp8 Megatron's of Transformer Engine's linear layers,
    which Megatron's transformer block runs under Transformer Engine's autocast."""
    if config is None or config.fp8 is None:
        return ModuleSpec(module=GroupedExperts)
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TERowParallelGroupedLinear,
    )

    linears = MLPSubmodules(
        linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
    )
    return ModuleSpec(module=TEGroupedMLP, submodules=linears)


def _shared_experts_spec(config: TransformerConfig | None) -> ModuleSpec:
    """Megatron's shared expert, which ``moe_shared_expert_intermediate_size`` alone builds."""
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if spec_backend(config)[0] == "transformer_engine":
        from megatron.core.extensions.transformer_engine import (
            TEColumnParallelLinear,
            TERowParallelLinear,
        )

        linears = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return ModuleSpec(module=SharedExpertMLP, submodules=linears)


def _dense_layer_spec(config: TransformerConfig | None, local_norm: type) -> ModuleSpec:
    attention = {}
    if config is not None:
        attention = {
            "qk_layernorm": config.qk_layernorm,
            "qk_l2_norm": config.qk_l2_norm,
            "multi_latent_attention": config.multi_latent_attention,
        }
    if spec_backend(config)[0] == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(**attention)
    if torch.cuda.is_available() and config is not None and config.context_parallel_size > 1:
        raise ValueError(
            f"context_parallel_size={config.context_parallel_size} with local modules on CUDA: "
            f"{CUT_ATTENTION_ON_CUDA}; use 1, or Transformer Engine"
        )
    spec = get_gpt_layer_local_spec(**attention)
    spec.submodules.input_layernorm = local_norm
    spec.submodules.pre_mlp_layernorm = local_norm
    if not torch.cuda.is_available():
        spec.submodules.self_attention.submodules.core_attention = CpuAttention
    return spec


# Megatron-LM's import_module reads vars(module)[name]: the object must really be there. Nothing of
# the environment is read before a layer is built.
vqmoe_layer_spec = _layer_spec(None, EnvironmentLayer, {}, DEFAULT_ROUTER)
