"""Once per optimizer step: finish kept tables, reduce what every rank saw, move codebooks alike.

N experts, C code slices, K codes per slice, D slice width, M candidates.

Group: ``tp_dp_cp`` is exactly the set of ranks that hold a replica of the layer and saw different
tokens (sequence shards over TP, samples over DP). Never the world group: pipeline stages hold
different layers. All layers of a stage share one all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from vqmoe_megatron.moe.layer import VQMoELayer
from vqmoe_megatron.moe.router import VQRouter
from vqmoe_megatron.moe.step_table import StepTable
from vqmoe_megatron.vq.codebook_update import StepStatistics


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's reduced view of a step; equal on all replicas."""

    layer_number: int  # 1-based, over all pipeline stages
    scalars: dict[str, torch.Tensor]  # fp32 scalars by metric name, without prefix
    expert_load: torch.Tensor | None  # fp32 [N] rows per expert; None for a bare VQRouter
    code_usage: torch.Tensor | None  # fp32 [C, K] tokens per code; None without a codebook


Reduced = tuple[VQMoELayer | VQRouter, list[torch.Tensor]]  # a layer, its summed accumulators


class CodebookSync:
    """Megatron's gradient finalisation followed by the codebook step.

    Use as ``config.finalize_model_grads_func``: Megatron's schedules call it once per training step
    and never in evaluation. ``layers`` holds the statistics of the latest step.

    With ``applies_at_once=False`` a call only reduces; the loop then calls :meth:`apply`, or
    :meth:`discard` for a step that it skips.
    """

    def __init__(self, applies_at_once: bool = True) -> None:
        self.applies_at_once = applies_at_once
        self.layers: list[LayerStatistics] = []
        self._reduced: list[Reduced] = []

    def __call__(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        """Differentiate kept tables, finalize gradients (Megatron's groups), then reduce
        statistics over ``tp_dp_cp``."""
        for owner in _owners(model):
            if (table := _step_table(owner)) is not None:
                table.backward()
        finalize_model_grads(model, *args, **kwargs)
        self._reduced = reduce_statistics(model)
        if self.applies_at_once:
            self.apply()

    def apply(self) -> None:
        """Move the codebooks by the reduced step. No communication."""
        self.layers = [_apply(owner, iter(parts)) for owner, parts in self._reduced]
        self._reduced = []

    def discard(self, model: list[torch.nn.Module]) -> None:
        """Forget the step: accumulators are cleared, codebooks stay. No communication."""
        self.layers, self._reduced = [], []
        for owner in _owners(model):
            _clear(owner)


def synchronize_codebooks(model: list[torch.nn.Module]) -> list[LayerStatistics]:
    """Reduce the step's statistics and apply them to every codebook of ``model``.

    Args:
        model: the model chunks of this rank.

    Returns:
        Statistics of this rank's layers, in layer order.

    Raises:
        ValueError: for a layer with one table per step, whose gradient would come too late here.

    Communicates: one all-reduce over ``tp_dp_cp`` for all layers of this rank.
    """
    if any(_step_table(owner) is not None for owner in _owners(model)):
        raise ValueError(
            "vq.table_per_step brings gradients to the weights before they are reduced; use "
            "CodebookSync as config.finalize_model_grads_func, which does that first"
        )
    return [_apply(owner, iter(parts)) for owner, parts in reduce_statistics(model)]


def reduce_statistics(model: list[torch.nn.Module]) -> list[Reduced]:
    """Sum every layer's accumulators over its replicas, without applying them.

    Communicates: one all-reduce over ``tp_dp_cp`` for all layers of this rank.
    """
    owners = _owners(model)
    if not owners:
        return []
    parts = [_local_parts(owner) for owner in owners]
    everything = [part for of_owner in parts for part in of_owner]
    flat = torch.cat([part.reshape(-1) for part in everything])
    torch.distributed.all_reduce(flat, group=_replica_group(owners[0]))
    pieces = iter(flat.split([part.numel() for part in everything]))
    return [
        (owner, [next(pieces).view_as(part) for part in of_owner])
        for owner, of_owner in zip(owners, parts, strict=True)
    ]


def _owners(model: list[torch.nn.Module]) -> list[VQMoELayer | VQRouter]:
    return [m for chunk in model for m in chunk.modules() if isinstance(m, VQMoELayer | VQRouter)]


def _step_table(owner: VQMoELayer | VQRouter) -> StepTable | None:
    return owner.step_table if isinstance(owner, VQMoELayer) else None


def _clear(owner: VQMoELayer | VQRouter) -> None:
    if (table := _step_table(owner)) is not None:
        table.clear()
    if isinstance(owner, VQMoELayer):
        owner.step_expert_load.zero_()
        owner.step_gate.zero_()
    if owner.assigner is not None:
        owner.assigner.clear_step()
        owner.assigner.codebook.clear_step()


def _replica_group(owner: VQMoELayer | VQRouter) -> torch.distributed.ProcessGroup:
    if owner.assigner is not None:
        return owner.assigner.pg_collection.tp_dp_cp
    return owner.router.tp_dp_cp_group


def _local_parts(owner: VQMoELayer | VQRouter) -> list[torch.Tensor]:
    """The fp32 tensors to reduce, in the order in which :func:`_apply` takes them."""
    parts = []
    if isinstance(owner, VQMoELayer):
        parts += [owner.step_expert_load, owner.step_gate]
    if owner.assigner is not None:
        codebook = owner.assigner.codebook
        parts += [owner.assigner.step_losses, codebook.step_count]
        parts += [codebook.step_total] if codebook.keeps_sums else []
        parts += [owner.assigner.candidate_table()]
    return parts


def _apply(owner: VQMoELayer | VQRouter, reduced: Iterator[torch.Tensor]) -> LayerStatistics:
    scalars: dict[str, torch.Tensor] = {}
    load = usage = None
    if isinstance(owner, VQMoELayer):
        load, gate = next(reduced), next(reduced)
        scalars["expert_load_imbalance"] = load.max() / load.mean().clamp(min=1e-12)
        scalars["combine_discrete_weight"] = gate[0] / gate[1].clamp(min=1.0)
    if owner.assigner is not None:
        codebook = owner.assigner.codebook
        losses, usage = next(reduced), next(reduced)
        total = next(reduced) if codebook.keeps_sums else None
        scalars |= codebook.apply_step(StepStatistics(usage, total, next(reduced)))
        num_microbatches = losses[2].clamp(min=1.0)
        scalars["commitment_loss"] = losses[0] / num_microbatches
        scalars["codebook_loss"] = losses[1] / num_microbatches
    _clear(owner)
    return LayerStatistics(owner.layer_number, scalars, load, usage)
