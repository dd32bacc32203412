"""A VQMoE layer small enough to test everywhere, and its parameters drawn once for all layouts.

T tokens, H hidden size, F expert hidden size, N experts, G = 2 for gated experts else 1, C code
slices, K codes, D = H / C.

``draw_parameters`` makes the tensors of the whole layer in fp64, by the layer's own names. The
oracle takes them as they are; ``build_layer``, called in a rank, copies them into a real layer,
each rank its own cut of the experts. ``join_experts`` puts the cuts of all ranks together again.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from vqmoe_megatron.config import VQConfig
from vqmoe_megatron.vq.codebook import Codebook

HIDDEN = 16
SHARED_FFN = 24  # of a shared expert
FFN = 48  # a quarter of it is still a grouped GEMM's 16 bytes of fp32, at ETP 4
NUM_EXPERTS = 4
# by expert, and so over expert-parallel ranks
CUT = ("experts.", "fill_rows.", "code_memory.")
REPLICAS = ("bias2", "fill_rows.values")  # on the ranks of an expert-tensor group
NORMS = {
    "none": [],
    "shared": ["input"],
    "shared_with_block": ["input"],
    "separate": ["input", "output"],
}
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
    num_experts: int = NUM_EXPERTS,
    shared: bool = False,
) -> dict[str, torch.Tensor]:
    """The layer's parameters, fp64, of a scale at which every term of the output matters."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    fc1 = 2 * FFN if gated else FFN
    drawn = {
        "experts.weight1": draw(num_experts, fc1, HIDDEN, scale=HIDDEN**-0.5),
        "experts.weight2": draw(num_experts, HIDDEN, FFN, scale=FFN**-0.5),
    }
    if bias:
        drawn["experts.bias1"] = draw(num_experts, fc1, scale=0.3)
        drawn["experts.bias2"] = draw(num_experts, HIDDEN, scale=0.3)
    if shared:
        width = 2 * SHARED_FFN if gated else SHARED_FFN
        drawn["shared_experts.linear_fc1.weight"] = draw(width, HIDDEN, scale=HIDDEN**-0.5)
        drawn["shared_experts.linear_fc2.weight"] = draw(HIDDEN, SHARED_FFN, scale=SHARED_FFN**-0.5)
    if vq.path != "discrete" and num_experts > 1:
        drawn["router.weight"] = draw(num_experts, HIDDEN, scale=0.5)
        if bias:
            drawn["router.bias"] = draw(num_experts, scale=0.5)
    if vq.path != "continuous":
        width = vq.code_dim or HIDDEN // vq.num_slices_side_by_side
        if vq.code_dim is not None:  # a parameter if trained, and here without unit rows
            drawn["assigner.codebook.projection"] = draw(width, HIDDEN, scale=HIDDEN**-0.5)
        codes = draw(vq.num_code_slices, vq.num_codes, width)
        if vq.has_implicit_codes:
            numbers = vq.fsq_levels or [2] * vq.code_dim
            levels = [[2 * i / (n - 1) - 1 for i in range(n)] for n in numbers]
            codes = torch.tensor([list(product(*levels))], dtype=torch.float64)
        drawn["assigner.codebook.codes"] = codes
        if vq.learn_code_scale:
            drawn["assigner.codebook.scale"] = 0.7 + draw(1, 1, scale=0.1)
        if vq.quantizer == "lfq":
            shares = 0.2 + draw(1, vq.num_codes).abs()
            drawn["assigner.codebook.usage"] = shares / shares.sum()
        if vq.code_input == "learned":
            drawn["code_inputs.vectors"] = draw(vq.num_code_slices, vq.num_codes, HIDDEN)
    if vq.fill_values == "direct":
        drawn["fill_rows.values"] = draw(NUM_EXPERTS, vq.num_codes, HIDDEN)
    if vq.has_discrete_path:
        for name in NORMS[vq.norm]:
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
        "num_attention_heads": 4,
        "num_moe_experts": NUM_EXPERTS,
        "moe_ffn_hidden_size": FFN,
        "ffn_hidden_size": FFN,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "activation_func": ACTIVATIONS["gelu"],
        "tensor_model_parallel_size": tensor_parallel,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": 1,  # until after the constructor
        "sequence_parallel": tensor_parallel > 1,
        "gradient_accumulation_fusion": False,
    }
    settings.update(changes)
    config = TransformerConfig(**settings)
    # Its constructor refuses biased experts at ETP > 1, which Megatron's own experts cannot shard,
    # and nothing else in Megatron reads the field.
    config.expert_tensor_parallel_size = parallel_state.get_expert_tensor_parallel_world_size()
    return config


def expert_place() -> tuple[int, int]:
    """This rank's expert-parallel and expert-tensor rank. In a rank only."""
    from megatron.core import parallel_state

    return (
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )


def expert_slice(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's cut of a tensor [N, ...] of experts, of the name experts.weight1, ..., or of the
    rows that they own. In a rank only."""
    from megatron.core import parallel_state

    expert_rank, shard = expert_place()
    tensor = tensor.chunk(parallel_state.get_expert_model_parallel_world_size())[expert_rank]
    num_shards = parallel_state.get_expert_tensor_parallel_world_size()
    if name.startswith("code_memory."):
        return tensor.chunk(num_shards, dim=1)[shard]  # rows of each expert
    if name.endswith(REPLICAS):
        return tensor  # a replica on every shard's rank
    if name.endswith("weight2"):
        return tensor.chunk(num_shards, dim=2)[shard]
    halves = tensor.split(FFN, dim=1)  # G of [n, F, ...]
    return torch.cat([half.chunk(num_shards, dim=1)[shard] for half in halves], dim=1)


def join_experts(name: str, cuts: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
    """The whole tensor [N, ...] from the cuts by :func:`expert_place`; undoes ``expert_slice``."""
    whole = []
    num_shards = 1 + max(shard for _, shard in cuts)
    for expert_rank in range(1 + max(rank for rank, _ in cuts)):
        shards = [cuts[expert_rank, shard] for shard in range(num_shards)]
        if name.startswith("code_memory."):
            whole.append(torch.cat(shards, dim=1))
        elif name.endswith(REPLICAS):
            for shard in shards[1:]:
                assert torch.equal(shard, shards[0]), f"replicas of {name} differ"
            whole.append(shards[0])
        elif name.endswith("weight2"):
            whole.append(torch.cat(shards, dim=2))
        else:
            halves = zip(*(shard.split(FFN // num_shards, dim=1) for shard in shards), strict=True)
            whole.append(torch.cat([cut for half in halves for cut in half], dim=1))
    return torch.cat(whole)


def shared_slice(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """This rank's cut of a shared expert's weight. In a rank only."""
    from megatron.core import parallel_state

    shard = parallel_state.get_tensor_model_parallel_rank()
    num_shards = parallel_state.get_tensor_model_parallel_world_size()
    if "linear_fc2" in name:
        return tensor.chunk(num_shards, dim=1)[shard]
    return torch.cat([half.chunk(num_shards)[shard] for half in tensor.split(SHARED_FFN)])


def join_shared(name: str, cuts: dict[int, torch.Tensor]) -> torch.Tensor:
    """The whole weight from the cuts by tensor-parallel rank; undoes ``shared_slice``."""
    shards = [cuts[shard] for shard in range(len(cuts))]
    if "linear_fc2" in name:
        return torch.cat(shards, dim=1)
    halves = zip(*(shard.split(SHARED_FFN // len(cuts)) for shard in shards), strict=True)
    return torch.cat([cut for half in halves for cut in half])


def build_layer(  # noqa: ANN201
    vq: VQConfig,
    parameters: dict[str, torch.Tensor] | None = None,
    new_graph: Any = None,
    new_memory: Any = None,
    **changes: Any,
):
    """A VQMoELayer with grouped experts, holding ``parameters`` when given. In a rank only.

    ``new_memory`` makes its code memory from the configuration.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.moe_layer import MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    from vqmoe_megatron.moe import GroupedExperts, VQMoELayer
    from vqmoe_megatron.moe.routers.topk import BalancedRouter

    config = transformer_config(**changes)
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    routers = {"router": BalancedRouter} if vq.path == "filled" else {}
    layer = VQMoELayer(
        config,
        MoESubmodules(
            experts=ModuleSpec(module=GroupedExperts),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears),
            **routers,
        ),
        layer_number=1,
        vq=vq,
        new_graph=new_graph,
        memory=None if new_memory is None else new_memory(config),
    )
    if parameters is not None:
        layer.to(next(iter(parameters.values())).dtype)
        copy_parameters(layer, parameters)
    return layer


@torch.no_grad()
def copy_parameters(layer: torch.nn.Module, parameters: dict[str, torch.Tensor]) -> None:
    """Fill a layer, which must have exactly these parameters, and of its buffers those given."""
    code_map = parameters.get("assigner.code_map.expert_of_row")
    own = dict(layer.named_parameters())
    buffers = {"projection", "usage"}  # of the codebook; a trained projection is a parameter
    buffers = {f"assigner.codebook.{name}" for name in buffers} - set(own)
    expected = set(parameters) - buffers - {"assigner.code_map.expert_of_row"}
    if set(own) != expected:
        raise ValueError(f"the layer has {sorted(own)}, the test {sorted(expected)}")
    for name, parameter in own.items():
        value = parameters[name]
        if name.startswith(CUT):
            value = expert_slice(name, value)
        elif name.startswith("shared_experts."):
            value = shared_slice(name, value)
        parameter.copy_(value)
    for module in layer.modules():
        if isinstance(module, Codebook):
            module.needs_data_init = False  # the codes are given
    for name in buffers & set(parameters):
        layer.get_buffer(name).copy_(parameters[name])
    if code_map is not None:
        layer.assigner.code_map.assign(code_map)
