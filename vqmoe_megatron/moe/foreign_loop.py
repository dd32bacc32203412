"""The end of an optimizer step in a training loop that knows nothing of codebooks.

Whatever the loop (Megatron-LM's, Megatron-Bridge's, a hand-written one), every training forward
pass of a layer calls :func:`follow`, and a codebook moves exactly once per optimizer step:

1. ``follow`` puts :class:`CodebookSync` around what the loop has made
   ``config.finalize_model_grads_func``. Megatron's schedules read that field after the last
   microbatch, so it does not matter that a loop overwrote it when training began. There kept tables
   are differentiated and statistics reduced.
2. Before a torch optimizer steps (torch's own hook for all optimizers, which Megatron's wrap) the
   sums are applied. A loop that never called the schedule's hook gets the reduction here, too.
3. A step that the loop skips has no optimizer step: the next forward pass forgets its sums. Without
   the schedule's hook nobody tells a skipped step from a microbatch, and its tokens count in the
   next step.
4. What cannot be followed raises: weights that move without an optimizer of torch, a kept table
   whose gradient would come too late, trained codes among bf16 weights.

A loop that has made :class:`CodebookSync` its finalise function is left alone.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vqmoe_megatron.moe.codebook_sync import (
    CodebookSync,
    apply_statistics,
    reduce_statistics,
    waiting_for_an_optimizer,
)
from vqmoe_megatron.moe.megatron_log import log_statistics
from vqmoe_megatron.moe.step_owner import StepOwner

NUM_SAMPLED_ELEMENTS = 64  # of each weight, to see that it moved
MOST_MICROBATCHES = 65_536  # of one step, for where no weight is seen to move

# Every owner that trains, in the order of first forward passes, which is the same on all replicas;
# and, until the end of a step was seen, elements of its weights before the first microbatch.
_followed: weakref.WeakKeyDictionary[StepOwner, list[torch.Tensor]] = weakref.WeakKeyDictionary()
_latest_config = 0  # id of the configuration whose model was evaluated last


class ForeignSync(CodebookSync):
    """Around a foreign loop's finalise function; applied before its optimizer steps."""


def follow(owner: StepOwner, config: TransformerConfig) -> None:
    """See to it that ``owner``'s step ends once; called at each of its training forward passes.

    No communication; until the first step's end, one host synchronisation per microbatch.

    Raises:
        ValueError: when the weights moved and no step's end was seen, or the loop's optimizer
            cannot hold the codes.
    """
    global _latest_config
    _latest_config = id(config)
    if not isinstance(config.finalize_model_grads_func, CodebookSync):
        owner.refuse_foreign_optimizer()
        config.finalize_model_grads_func = ForeignSync(
            applies_at_once=False, finalize=config.finalize_model_grads_func
        )
    if owner.sums is not None:  # reduced, and no optimizer stepped since
        owner.clear_step()
    is_known = owner.has_ended_a_step or type(config.finalize_model_grads_func) is CodebookSync
    is_lost = owner.num_recorded_microbatches >= MOST_MICROBATCHES
    sample = [] if is_known else _sample(owner)
    if owner.num_recorded_microbatches == 0:
        _followed[owner] = sample
    else:
        is_lost |= not all(map(torch.equal, sample, _followed[owner]))
    if is_lost:
        raise ValueError(
            f"the weights of VQ layer {owner.layer_number} moved, but no optimizer of torch "
            "stepped and no training schedule of Megatron ended, so its codebook would never move; "
            "call vqmoe_megatron.moe.synchronize_codebooks(model) once per step, before the update"
        )


def _sample(owner: StepOwner) -> list[torch.Tensor]:
    """Some elements of every parameter that only an optimizer moves, copied.

    A bare VQRouter has none beside its codes, which are also set from data.
    """
    return [
        p.detach().flatten()[:: max(1, p.numel() // NUM_SAMPLED_ELEMENTS)].clone()
        for name, p in owner.named_parameters()
        if p.requires_grad and not name.endswith("codebook.codes")
    ]


def _before_an_optimizer_steps(
    optimizer: torch.optim.Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]
) -> None:
    """Apply what waits, after reducing what no schedule has reduced.

    Of several optimizers that step one after the other (Megatron chains dense and expert ones) the
    first finds everything, the others nothing.

    Communicates: one all-reduce over ``tp_dp_cp`` where no schedule did, and ``log_statistics``.
    """
    for sync in waiting_for_an_optimizer():
        owners = sync.owners
        sync.apply()
        log_statistics(owners, sync.layers)
    if owners := _unreduced_owners_of(optimizer):
        for owner in owners:
            owner.refuse_unfinished_table()
        reduce_statistics(owners)
        log_statistics(owners, apply_statistics(owners))


def _unreduced_owners_of(optimizer: torch.optim.Optimizer) -> list[StepOwner]:
    """Owners whose step ends with this optimizer's, in a loop without a schedule's hook.

    They belong to the model whose parameters it holds. The main copies of Megatron's mixed and
    distributed optimizers tell nothing about that, and a rank may hold none of a layer's; then it
    is the model that was evaluated last. Every replica must come to the same answer, so nothing
    here may depend on what Python has or has not collected.
    """
    gathering = [owner for owner in _followed if owner.num_recorded_microbatches]
    if not gathering:
        return []
    held = [p for group in optimizer.param_groups for p in group["params"]]
    ids = {id(p) for p in held}
    are_parameters = all(isinstance(p, torch.nn.Parameter) for p in held)

    def is_stepped(owner: StepOwner) -> bool:
        trained = [p for p in owner.parameters() if p.requires_grad]
        if trained and are_parameters:
            return any(id(p) in ids for p in trained)
        return id(owner.config) == _latest_config

    models = {id(owner.config) for owner in gathering if is_stepped(owner)}
    return [owner for owner in gathering if id(owner.config) in models]


register_optimizer_step_pre_hook(_before_an_optimizer_steps)
