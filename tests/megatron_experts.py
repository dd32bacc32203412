"""Megatron's own expert modules in the place of a layer's grouped experts. In a rank only."""

from __future__ import annotations

import torch


def use_megatron_experts(layer: torch.nn.Module) -> None:
    """Let Megatron's own modules do the experts' work, with the same weights."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    grouped = layer.experts
    own = SequentialMLP(
        grouped.num_local_experts,
        layer.config,
        MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        get_default_pg_collection(),
    ).to(grouped.weight1.dtype)
    with torch.no_grad():
        for e, expert in enumerate(own.local_experts):
            for number, linear in ((1, expert.linear_fc1), (2, expert.linear_fc2)):
                linear.weight.copy_(getattr(grouped, f"weight{number}")[e])
                if linear.bias is not None:
                    linear.bias.copy_(getattr(grouped, f"bias{number}")[e])
    layer.experts = layer.engine.experts = own
    layer.grouped_for_comparison = grouped


def stack_gradients(layer: torch.nn.Module) -> None:
    """Name the gradients of Megatron's modules as those of grouped experts."""
    grouped, own = layer.grouped_for_comparison, layer.experts
    del layer.grouped_for_comparison
    for number, linear in ((1, "linear_fc1"), (2, "linear_fc2")):
        for kind in ("weight", "bias"):
            parts = [getattr(getattr(e, linear), kind) for e in own.local_experts]
            if parts[0] is not None:
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parts]
                getattr(grouped, f"{kind}{number}").grad = torch.stack(grads)
    layer.experts = grouped
