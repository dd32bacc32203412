"""Once per optimizer step: finish kept tables, reduce what every rank saw, move codebooks alike.

Group: ``tp_dp_cp`` is exactly the set of ranks that hold a replica of the layer and saw different
tokens (sequence shards over TP, samples over DP). Never the world group: pipeline stages hold
different layers. All layers of a stage share one all-reduce.

A training loop needs nothing of this file: layers bring it along (``foreign_loop``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from torch.distributed.distributed_c10d import _coalescing_manager

from vqmoe_megatron.moe.megatron_log import log_statistics
from vqmoe_megatron.moe.step_owner import LayerStatistics, StepOwner, StepSums, step_owners


class CodebookSync:
    """Megatron's gradient finalisation followed by the codebook step.

    Use as ``config.finalize_model_grads_func``: Megatron's schedules call it once per training step
    and never in evaluation. ``layers`` holds the statistics of the latest step.

    With ``applies_at_once=False`` a call only reduces; codebooks move when the loop calls
    :meth:`apply`, or else before the optimizer's step; :meth:`discard` is for a step that is
    skipped.

    Args:
        applies_at_once: also for loops that never skip a step.
        finalize: what finalises the gradients; None: the loop does, after this call.
    """

    def __init__(
        self,
        applies_at_once: bool = True,
        finalize: Callable[..., Any] | None = finalize_model_grads,
    ) -> None:
        self.applies_at_once = applies_at_once
        self.finalize = finalize
        self.layers: list[LayerStatistics] = []
        self._owners: list[weakref.ref[StepOwner]] = []  # of the latest call

    def __deepcopy__(self, memo: dict) -> CodebookSync:
        """A copied configuration is another model's: nothing of this model's step goes along."""
        copied = type(self).__new__(type(self))
        CodebookSync.__init__(copied, self.applies_at_once, self.finalize)
        return copied

    def __call__(self, model: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        """Differentiate kept tables, finalize gradients (Megatron's groups), then reduce
        statistics over ``tp_dp_cp``.

        Raises:
            ValueError: for a kept table where gradients are reduced before this call.
        """
        owners = step_owners(model)
        if any(owner.keeps_table for owner in owners):
            _refuse_early_reduction(model)
        for owner in owners:
            owner.finish_table()
        if self.finalize is not None:
            self.finalize(model, *args, **kwargs)
        self._owners = [weakref.ref(owner) for owner in owners]
        self._end(owners, model)

    def _end(self, owners: list[StepOwner], model: list[torch.nn.Module]) -> None:
        reduce_statistics(owners, model)
        if self.applies_at_once:
            log_statistics(owners)
            self.apply()

    def apply(self) -> None:
        """Move the codebooks by the reduced step. No communication."""
        owners = [owner for known in self._owners if (owner := known()) is not None]
        self.layers = apply_statistics(owners)

    def discard(self, model: list[torch.nn.Module]) -> None:
        """Forget the step: accumulators are cleared, codebooks stay. No communication."""
        self.layers = []
        for owner in step_owners(model):
            owner.clear_step()


def _refuse_early_reduction(model: list[torch.nn.Module]) -> None:
    for chunk in model:
        if getattr(getattr(chunk, "ddp_config", None), "overlap_grad_reduce", False):
            raise ValueError(
                "vq.table_per_step with overlap_grad_reduce: gradients are reduced before the "
                "step's table has added its part; leave one of them out"
            )


def synchronize_codebooks(
    model: torch.nn.Module | list[torch.nn.Module],
) -> list[LayerStatistics]:
    """Reduce the step's statistics and apply them to every codebook of ``model``.

    Args:
        model: the model, or the model chunks, of this rank.

    Returns:
        Statistics of this rank's layers, in layer order.

    Raises:
        ValueError: for a layer with one table per step, whose gradient would come too late here.

    Communicates: as :func:`reduce_statistics`.
    """
    model = [model] if isinstance(model, torch.nn.Module) else model
    owners = step_owners(model)
    for owner in owners:
        owner.refuse_unfinished_table()
    reduce_statistics(owners, model)
    return apply_statistics(owners)


def reduce_statistics(owners: list[StepOwner], model: list[torch.nn.Module]) -> None:
    """Sum every owner's accumulators over its replicas, without applying them.

    An owner whose sums wait already keeps them: a finalise function may call another. One that
    recorded nothing takes part all the same, since its replicas may have. The accumulators
    themselves become the sums, without a copy: they are as large as the codebooks.

    Communicates: one all-reduce over ``tp_dp_cp`` for all ``owners``, coalesced as Megatron's
    gradient buckets are; one more for every other group or dtype among them; before it what owners
    gather.
    """
    owners = [owner for owner in owners if owner.sums is None]
    if not owners:
        return
    for owner in owners:
        owner.gather()
    parts = [owner.local_parts() for owner in owners]
    alike: dict[tuple[torch.distributed.ProcessGroup, torch.dtype], list[torch.Tensor]] = {}
    for owner, of_owner in zip(owners, parts, strict=True):
        for part in of_owner:
            alike.setdefault((owner.replica_group, part.dtype), []).append(part)
    for (group, _), same in alike.items():
        with _coalescing_manager(group):
            for part in same:
                torch.distributed.all_reduce(part, group=group)
    chunks = tuple(weakref.ref(chunk) for chunk in model)
    for owner, of_owner in zip(owners, parts, strict=True):
        owner.sums = StepSums(of_owner, owner.num_recorded_microbatches, chunks)
        owner.num_recorded_microbatches = 0


def apply_statistics(owners: list[StepOwner]) -> list[LayerStatistics]:
    """Move each owner whose sums wait, and clear its step. No communication."""
    return [owner.apply_sums() for owner in owners if owner.sums is not None]
