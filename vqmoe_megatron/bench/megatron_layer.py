"""Megatron's own MoE layer holding the shared weights: what every ratio is taken against.

n local experts, H hidden size, F expert hidden size.

On CUDA with Transformer Engine its experts are TE's grouped GEMM and its permutation is fused; else
they are Megatron's ``SequentialMLP``. The dispatcher is ``alltoall``.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.weights import Weights, share_weights
from vqmoe_megatron.moe.grouped_experts import GroupedExperts
from vqmoe_megatron.moe.routers.topk import BalancedRouter
from vqmoe_megatron.moe.spec import spec_backend


def transformer_config(case: LayerCase, topk: int) -> TransformerConfig:
    """Return the configuration of one layer on the current layout, without biases or balance
    loss."""
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    has_engine = spec_backend()[0] == "transformer_engine"
    dtype = getattr(torch, case.dtype)
    return TransformerConfig(
        num_layers=1,
        hidden_size=case.hidden_size,
        num_attention_heads=tensor_parallel,  # a layer has none; Megatron wants a multiple of TP
        num_moe_experts=case.num_experts,
        moe_ffn_hidden_size=case.ffn_hidden_size,
        ffn_hidden_size=case.ffn_hidden_size,
        moe_router_topk=topk,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=has_engine,
        moe_permute_fusion=has_engine,
        add_bias_linear=False,
        activation_func=torch.nn.functional.gelu,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tensor_parallel,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        sequence_parallel=tensor_parallel > 1,
    )


def own_submodules() -> MoESubmodules:
    """Return the package's grouped experts and router, as its layer specs use them."""
    return MoESubmodules(router=BalancedRouter, experts=ModuleSpec(module=GroupedExperts))


def megatron_layer(
    case: LayerCase, topk: int, uses_own_experts: bool, weights: Weights
) -> tuple[MoELayer, dict[str, list[torch.nn.Parameter]]]:
    """Build the layer around the shared weights.

    Args:
        case: sizes and dtype.
        topk: experts per token.
        uses_own_experts: put the package's ``GroupedExperts`` into Megatron's layer, so that only
            routing and dispatch differ.
        weights: of this rank.

    Returns:
        The layer, and its parameters by their shared names; where Megatron keeps one parameter per
        expert, the list of them, to be stacked. No communication.
    """
    if uses_own_experts:
        submodules = own_submodules()
    else:
        has_engine = spec_backend()[0] == "transformer_engine"
        spec = get_moe_module_spec(has_engine, case.num_experts, moe_grouped_gemm=has_engine)
        submodules = MoESubmodules(experts=spec.submodules.experts)
    layer = MoELayer(transformer_config(case, topk), submodules, layer_number=1)
    share_weights(layer, weights)
    by_name = {"router.weight": [layer.router.weight]}
    for name in ("experts.weight1", "experts.weight2"):
        by_name[name] = [weights[name]]
        if not uses_own_experts:
            by_name[name] = _share_per_expert(layer, name, weights[name])
    return layer, by_name


def _share_per_expert(
    layer: MoELayer, name: str, stacked: torch.nn.Parameter
) -> list[torch.nn.Parameter]:
    """Give each expert its row of ``stacked`` [n, ...]: a parameter of its own, the same memory."""
    linear = {"experts.weight1": "linear_fc1", "experts.weight2": "linear_fc2"}[name]
    parameters = []
    for expert, view in enumerate(stacked.data.unbind(0)):
        parameter = torch.nn.Parameter(view)
        if hasattr(layer.experts, "local_experts"):  # SequentialMLP
            owner, attribute = getattr(layer.experts.local_experts[expert], linear), "weight"
        else:  # TEGroupedMLP
            owner, attribute = getattr(layer.experts, linear), f"weight{expert}"
        parameter.__dict__.update(getattr(owner, attribute).__dict__)  # Megatron's marks
        setattr(owner, attribute, parameter)
        parameters.append(parameter)
    return parameters
