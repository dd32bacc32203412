"""Layouts that train and that a plan does not count: it refuses them rather than be wrong."""

from __future__ import annotations

from collections.abc import Iterator

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.plan.layout import ParallelLayout, layout_errors


def counted_layout_errors(config: RunConfig, world_size: int, device: str | None) -> list[str]:
    """:func:`layout_errors`, and where there are none what keeps a plan from being right."""
    errors = layout_errors(config, world_size, device)
    return errors or list(uncounted(config, ParallelLayout.from_config(config, world_size)))


def uncounted(config: RunConfig, layout: ParallelLayout) -> Iterator[str]:
    """Yield a sentence for each thing about ``layout`` that no formula here counts."""
    if layout.context_parallel_size > 1:
        yield (
            f"context_parallel_size = {layout.context_parallel_size} > 1: vqmoe plan does not "
            "count what context-parallel ranks gather (keys, values, token ids), nor the memory "
            "and time of it; vqmoe pretrain trains so on a CPU, and a plan needs 1"
        )
    memory, tp = config.model.memory_length_tokens, layout.tensor_model_parallel_size
    if memory and tp > 1:
        yield (
            f"memory_length_tokens = {memory} with TP = {tp} > 1: vqmoe plan does not count what "
            "tensor-parallel ranks gather of a segment for the memory; vqmoe pretrain trains so, "
            "and a plan needs TP = 1"
        )
