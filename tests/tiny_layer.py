"""A VQMoE layer small enough to test everywhere, and its parameters drawn once for all layouts.

T tokens, H hidden size, F expert hidden size, N experts, C code slices, K codes, D = H / C.

``draw_parameters`` makes the tensors of the whole layer in fp64, by the layer's own names. The
oracle takes them as they are; ``build_layer``, called in a rank, copies them into a real layer,
each rank its own slice of the experts.
"""

from __future__ import annotations

from typing import Any

import torch

from vqmoe_megatron.config import VQConfig

HIDDEN = 16
FFN = 24
NUM_EXPERTS = 4
ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}


def draw_parameters(
    vq: VQConfig,
    *,
    gated: bool = False,
    bias: bool = True,
    normalization: str = "LayerNorm",
    seed: int = 7,
) -> dict[str, torch.Tensor]:
    """The layer's parameters, fp64, of a scale at which every term of the output matters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    fc1 = 2 * FFN if gated else FFN
    drawn = {
        "experts.weight1": draw(NUM_EXPERTS, fc1, HIDDEN, scale=HIDDEN**-0.5),
        "experts.weight2": draw(NUM_EXPERTS, HIDDEN, FFN, scale=FFN**-0.5),
    }
    if bias:
        drawn["experts.bias1"] = draw(NUM_EXPERTS, fc1, scale=0.3)
        drawn["experts.bias2"] = draw(NUM_EXPERTS, HIDDEN, scale=0.3)
    if vq.path != "discrete":
        drawn["router.weight"] = draw(NUM_EXPERTS, HIDDEN, scale=0.5)
        if bias:
            drawn["router.bias"] = draw(NUM_EXPERTS, scale=0.5)
    if vq.path != "continuous":
        width = HIDDEN // vq.num_code_slices
        drawn["assigner.codebook.codes"] = draw(vq.num_code_slices, vq.num_codes, width)
        for name in {"none": [], "shared": ["input"], "separate": ["input", "output"]}[vq.norm]:
            drawn[f"{name}_norm.weight"] = 1.0 + draw(HIDDEN, scale=0.2)
            if normalization == "LayerNorm":
                drawn[f"{name}_norm.bias"] = draw(HIDDEN, scale=0.2)
    if vq.path == "dual":
        outputs = 2 if vq.combine == "softmax" else 1
        drawn["gate.linear.weight"] = draw(outputs, HIDDEN, scale=0.5)
        drawn["gate.linear.bias"] = draw(outputs, scale=0.5)
    return drawn


def transformer_config(**changes: Any):  # noqa: ANN201
    """A TransformerConfig for this layer and the current layout. In a rank only."""
    from megatron.core import parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    settings = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": NUM_EXPERTS,
        "moe_ffn_hidden_size": FFN,
        "ffn_hidden_size": FFN,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "activation_func": ACTIVATIONS["gelu"],
        "tensor_model_parallel_size": tensor_parallel,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": 1,
        "sequence_parallel": tensor_parallel > 1,
        "gradient_accumulation_fusion": False,
    }
    settings.update(changes)
    return TransformerConfig(**settings)


def expert_slice(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's experts out of [N, ...]. In a rank only."""
    from megatron.core import parallel_state

    size = parallel_state.get_expert_model_parallel_world_size()
    return tensor.chunk(size)[parallel_state.get_expert_model_parallel_rank()]


def build_layer(vq: VQConfig, parameters: dict[str, torch.Tensor] | None = None, **changes: Any):  # noqa: ANN201
    """A VQMoELayer with grouped experts, holding ``parameters`` when given. In a rank only."""
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    from vqmoe_megatron.moe import GroupedExperts, VQMoELayer

    layer = VQMoELayer(
        transformer_config(**changes),
        MoESubmodules(experts=ModuleSpec(module=GroupedExperts)),
        layer_number=1,
        vq=vq,
    )
    if parameters is not None:
        layer.to(next(iter(parameters.values())).dtype)
        copy_parameters(layer, parameters)
    return layer


@torch.no_grad()
def copy_parameters(layer: torch.nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    """Fill a layer, which must have exactly these parameters, and its code map when one is
    given."""
    code_map = parameters.get("assigner.code_map.expert_of_row")
    own = dict(layer.named_parameters())
    expected = set(parameters) - {"assigner.code_map.expert_of_row"}
    if set(own) != expected:
        raise ValueError(f"the layer has {sorted(own)}, the test {sorted(expected)}")
    for name, parameter in own.items():
        value = parameters[name]
        parameter.copy_(expert_slice(value) if name.startswith("experts.") else value)
    if layer.assigner is not None:
        layer.assigner.codebook.needs_data_init = False  # the codes are given
    if code_map is not None:
        layer.assigner.code_map.assign(code_map)
