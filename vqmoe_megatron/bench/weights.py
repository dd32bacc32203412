"""The parameters that all arms share: drawn once, and put into each arm's own modules.

N experts, H hidden size, F expert hidden size; this rank holds n of the experts, and of them one of
E cuts of F.

Arms share the tensors themselves, so that every arm reads the same memory and 256 experts fit many
times. A gradient is therefore taken out of the shared parameter before the next arm runs.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from vqmoe_megatron.bench.cases import LayerCase

Weights = dict[str, torch.nn.Parameter]  # by the names of VQMoELayer.named_parameters()


def draw_weights(case: LayerCase, router_weight: torch.Tensor) -> Weights:
    """Draw this rank's cut of every parameter but the codebook, in the case's dtype.

    Args:
        case: sizes, dtype and seed; equal seeds give all ranks cuts of the same experts.
        router_weight: ``[N, H]``.

    No communication.
    """
    generator = torch.Generator().manual_seed(case.seed + 1_000_003)
    dtype, device = getattr(torch, case.dtype), torch.cuda.current_device()
    hidden, ffn = case.hidden_size, case.ffn_hidden_size

    def draw(*shape: int, scale: float, offset: float = 0.0) -> torch.Tensor:
        return offset + scale * torch.randn(*shape, generator=generator)

    drawn = {
        "experts.weight1": _own_cut(draw(case.num_experts, ffn, hidden, scale=hidden**-0.5), 1),
        "experts.weight2": _own_cut(draw(case.num_experts, hidden, ffn, scale=ffn**-0.5), 2),
        "router.weight": router_weight,
        "gate.linear.weight": draw(2, hidden, scale=0.1 * hidden**-0.5),
        "gate.linear.bias": draw(2, scale=0.5),
    }
    for name in ("input_norm", "output_norm"):
        drawn[f"{name}.weight"] = draw(hidden, scale=0.2, offset=1.0)
        drawn[f"{name}.bias"] = draw(hidden, scale=0.2)
    return {
        name: torch.nn.Parameter(tensor.to(device=device, dtype=dtype).contiguous())
        for name, tensor in drawn.items()
    }


def _own_cut(experts: torch.Tensor, ffn_axis: int) -> torch.Tensor:
    """[N, ...] of all ranks -> [n, ...] of this one, cut along F when experts are sharded."""
    num_ranks = parallel_state.get_expert_model_parallel_world_size()
    num_shards = parallel_state.get_expert_tensor_parallel_world_size()
    own = experts.chunk(num_ranks)[parallel_state.get_expert_model_parallel_rank()]
    shards = own.chunk(num_shards, dim=ffn_axis)
    return shards[parallel_state.get_expert_tensor_parallel_rank()]


def share_weights(module: torch.nn.Module, weights: Weights) -> None:
    """Put the shared parameters in the place of those of the same name and shape.

    Raises:
        ValueError: when a parameter of that name has another shape.
    """
    for name, own in list(module.named_parameters()):
        if name not in weights:
            continue
        if own.shape != weights[name].shape:
            raise ValueError(
                f"{name}: the module has {list(own.shape)}, the benchmark "
                f"{list(weights[name].shape)}"
            )
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, weights[name])
