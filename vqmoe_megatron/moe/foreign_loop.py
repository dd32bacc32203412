"""The end of an optimizer step in a training loop that knows nothing of codebooks.

Whatever the loop (Megatron-LM's, Megatron-Bridge's, a hand-written one), every training forward
pass of a layer calls :func:`follow`, and a codebook moves exactly once per optimizer step:

1. ``follow`` puts :class:`CodebookSync` around what the loop has made
   ``config.finalize_model_grads_func``. Megatron's schedules read that field after the last
   microbatch, so it does not matter that a loop overwrote it when training began. There kept tables
   are differentiated and statistics reduced and logged.
2. Before a torch optimizer steps (torch's own hook for all optimizers, which Megatron's wrap) the
   sums of its model are applied. A loop that never called the schedule's hook gets the reduction
   here, too; there every rank must have trained the layers.
3. A step that the loop skips has no optimizer step: the next forward pass forgets its sums. Without
   the schedule's hook nobody tells a skipped step from a microbatch, and its tokens count in the
   next step.
4. What is seen not to be followed raises: weights that moved while no optimizer of torch stepped, a
   kept table whose gradient would come too late, trained codes among bf16 weights. A bare VQRouter
   has no weights to look at; it raises after ``MOST_MICROBATCHES``.

A loop that has made :class:`CodebookSync` its finalise function is left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.optim.optimizer import register_optimizer_step_pre_hook

from vqmoe_megatron.moe.codebook_sync import CodebookSync, apply_statistics, reduce_statistics
from vqmoe_megatron.moe.held_tensors import HeldTensors
from vqmoe_megatron.moe.megatron_log import log_statistics
from vqmoe_megatron.moe.step_owner import StepOwner, StepSums

NUM_SAMPLED_ELEMENTS = 64  # of each weight, to see that it moved
MOST_MICROBATCHES = 16_384  # of one step, for where no weight is seen to move

# Every owner that trains, in the order of first forward passes, which is the same on all replicas;
# and versions and elements of its weights before the first microbatch of the step.
Watched = list[tuple[int, torch.Tensor]]
_followed: weakref.WeakKeyDictionary[StepOwner, Watched] = weakref.WeakKeyDictionary()
_latest_config = 0  # id of the configuration whose model was evaluated last
ADVICE = "call vqmoe_megatron.moe.synchronize_codebooks(model) once per step, before the update"


class ForeignSync(CodebookSync):
    """Around a foreign loop's finalise function; the optimizer's step applies what it reduces."""

    def __init__(self, finalize: Callable[..., Any] | None) -> None:
        super().__init__(applies_at_once=False, finalize=finalize)

    def _end(self, owners: list[StepOwner], model: list[torch.nn.Module]) -> None:
        had_ended = any(owner.sums is not None for owner in owners)  # within ``finalize``
        super()._end(owners, model)
        if not had_ended:
            log_statistics(owners)


def follow(owner: StepOwner, config: TransformerConfig) -> None:
    """See to it that ``owner``'s step ends once; called at each of its training forward passes.

    No communication; until the first step's end, one host synchronisation per microbatch.

    Raises:
        ValueError: when no step's end is seen though the weights moved, or the loop's optimizer
            cannot hold the codes.
    """
    global _latest_config
    _latest_config = id(config)
    if not isinstance(config.finalize_model_grads_func, CodebookSync):
        owner.refuse_foreign_optimizer()
        config.finalize_model_grads_func = ForeignSync(config.finalize_model_grads_func)
    is_foreign = isinstance(config.finalize_model_grads_func, ForeignSync)
    is_between_steps = owner.num_recorded_microbatches == 0 and owner.sums is None
    if is_between_steps:
        watched = _watched_weights(owner) if is_foreign else []
        _followed[owner] = [(p._version, _sample(p)) for p in watched]
    elif is_foreign and _have_moved(owner, _followed.get(owner, [])):
        raise ValueError(
            f"the weights of VQ layer {owner.layer_number} moved, but no optimizer of torch that "
            "holds them was about to step (within a step, in a closure, is too late), so its "
            f"codebook would never move; {ADVICE}"
        )
    if owner.num_recorded_microbatches >= MOST_MICROBATCHES:
        raise ValueError(
            f"VQ layer {owner.layer_number} was trained on {owner.num_recorded_microbatches} "
            f"microbatches, and no optimizer that holds its weights stepped; {ADVICE}, or put the "
            "layer into evaluation"
        )
    if owner.sums is not None and torch.is_grad_enabled():  # and no optimizer stepped since
        owner.clear_step()


def _watched_weights(owner: StepOwner) -> list[torch.nn.Parameter]:
    """Parameters that only an optimizer moves; Megatron's DDP hides moves from torch's versions."""
    return [
        p
        for name, p in owner.named_parameters()
        if p.requires_grad
        and not name.endswith("codebook.codes")  # also set from data
        and not (owner.has_ended_a_step and hasattr(p, "main_grad"))
    ]


def _sample(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Some elements, copied."""
    stride = max(1, parameter.numel() // NUM_SAMPLED_ELEMENTS)
    return parameter.detach().flatten()[::stride].clone()


def _have_moved(owner: StepOwner, before: Watched) -> bool:
    """Whether a weight is another than before the first microbatch of the step.

    Until the end of a step was seen values are compared, at a host synchronisation; from then on
    only those of weights that torch counts as written.
    """
    weights = _watched_weights(owner)
    if len(weights) != len(before):  # the first step's end was seen in between
        return False
    return any(
        not (owner.has_ended_a_step and p._version == version) and not torch.equal(_sample(p), old)
        for p, (version, old) in zip(weights, before, strict=True)
    )


def _before_an_optimizer_steps(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Apply what waits for this optimizer, after reducing what no schedule has reduced.

    Of several optimizers that step one after the other (Megatron chains dense and expert ones) the
    first finds everything, the others nothing.

    Communicates: one all-reduce over ``tp_dp_cp`` where no schedule did.

    Raises:
        ValueError: for a closure, which trains after this moment.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is not None and _followed:
        held = HeldTensors(optimizer)
        if any(held.holds_one_of(owner.parameters()) for owner in _followed):
            raise ValueError(
                "optimizer.step(closure) trains VQ layers inside the step, and their codebooks "
                "would lag a step behind; call loss.backward() and then optimizer.step() without a "
                "closure (LBFGS cannot be used)"
            )
    reduced = [owner for owner in _followed if owner.sums is not None]
    gathering = [o for o in _followed if o.sums is None and o.num_recorded_microbatches]
    if not reduced and not gathering:
        return
    held = HeldTensors(optimizer)
    apply_statistics([owner for owner in reduced if _is_stepped(owner.sums, held)])
    if owners := _owners_stepped_with(held, gathering):
        for owner in owners:
            owner.refuse_unfinished_table()
        reduce_statistics(owners, owners)
        log_statistics(owners)
        apply_statistics(owners)


def _is_stepped(sums: StepSums, held: HeldTensors) -> bool:
    """Whether an optimizer belongs to the model that a schedule has finalised.

    A rank may hold no shard of anything; only tensors that are none of the model's say no.
    """
    chunks = [chunk for known in sums.chunks if (chunk := known()) is not None]
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    return not held.has_any or held.holds_one_of(parameters)


def _owners_stepped_with(held: HeldTensors, gathering: list[StepOwner]) -> list[StepOwner]:
    """Owners whose step ends with an optimizer's, in a loop without a schedule's hook.

    Those it holds. Of layers without trained weights, and where Megatron keeps main copies that may
    lie on another rank, nothing is known: they go with those of the same configuration, or, where
    it holds none, if theirs is the model that was evaluated last.
    """
    held_owners = [owner for owner in gathering if held.holds_one_of(owner.parameters())]
    models = {id(owner.config) for owner in held_owners} or {_latest_config}
    unknown = [
        owner
        for owner in gathering
        if id(owner.config) in models and not held.is_a_stranger_to(owner.parameters())
    ]
    return [owner for owner in gathering if owner in held_owners or owner in unknown]


register_optimizer_step_pre_hook(_before_an_optimizer_steps)
