"""The discrete path's fast forms in Megatron's loop: CUDA graphs, and what starts early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.plan.capture import capture_obstacles, overlap_obstacles, starts_rows
from vqmoe_megatron.plan.layout import ParallelLayout
from vqmoe_megatron.runtime.graphs import CudaGraph, Graph


@dataclass(frozen=True)
class FastPath:
    """What of ``train.cuda_graphs`` and ``vq.overlap_table`` is done, and why not the rest."""

    new_graph: Callable[[], Graph] | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, config: RunConfig, layout: ParallelLayout) -> FastPath:
        """Decide for a recipe at a layout, on this machine. No communication."""
        has_cuda = torch.cuda.is_available()
        notes = []
        if has_cuda and config.code_memory.is_on and not starts_rows(config):
            notes.append(
                "rows of the code memory travel after attention, not beside it: "
                "optimizer.overlap_param_gather brings weights for the stream that asks first"
            )
        if config.vq.overlap_table:
            reasons = overlap_obstacles(config, has_cuda)
            notes += [f"vq.overlap_table overlaps nothing here: {reason}" for reason in reasons]
        if not config.train.cuda_graphs:
            return cls(None, tuple(notes))
        reasons = list(capture_obstacles(config, layout))
        if not has_cuda:
            reasons.append("there is no CUDA device")
        notes += [f"train.cuda_graphs is off: {reason}" for reason in reasons]
        return cls(None if reasons else CudaGraph, tuple(notes))


def start_before_attention(model: torch.nn.Module, tables: bool, rows: bool) -> None:
    """Let every transformer layer of ``model`` start, as it is entered, what its VQMoE layer needs
    and hidden states have no part in: tables of ``vq.overlap_table``, rows of a code memory."""
    if not (tables or rows):
        return
    for layer in model.modules():
        experts = getattr(layer, "mlp", None)
        if isinstance(experts, VQMoELayer):
            layer.register_forward_pre_hook(
                lambda *_, experts=experts: experts.start_ahead(tables, rows)
            )
