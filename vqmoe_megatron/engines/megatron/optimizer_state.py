"""What Megatron's optimizer checkpoints need when the inner optimizer is torch's Adam.

Megatron prefers Transformer Engine's or Apex's fused Adam, whose state needs none of this; where
the recipe wants torch's, or on the CPU, :func:`use_torch_adam` puts it in its place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from vqmoe_megatron.engines.megatron.fused_adam import TORCH_ADAMS, step_counter, torch_adams

# fully_reshardable is the one layout-free format that torch's Adam can be saved in; the prefixless
# chain keeps dense and expert optimizers apart by parameter name.
OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}
# What Megatron's optimizers call the main copy of a parameter. In fp32 training none is stored: the
# model's own tensor, whose name has no prefix, is the main copy.
MAIN_PARAMETER_PREFIXES = ("optimizer.state.param.", "optimizer.state.fp32_param.", "")


def as_stored(part: ShardedBase, stored: set[str]) -> ShardedBase:
    """Return ``part`` of an optimizer's state under its name in the checkpoint.

    A plain and a distributed optimizer name the main copy of a parameter differently, or not at
    all; everything else they name alike. A name that is nowhere is left as it is.
    """
    own = next((p for p in MAIN_PARAMETER_PREFIXES if p and part.key.startswith(p)), None)
    if part.key in stored or own is None:
        return part
    bare = part.key.removeprefix(own)
    names = [prefix + bare for prefix in MAIN_PARAMETER_PREFIXES if prefix + bare in stored]
    return replace(part, key=names[0]) if names else part


def is_main_copy(part: ShardedBase) -> bool:
    """Whether ``part`` of an optimizer's state is the main copy of a parameter."""
    return part.key.startswith(MAIN_PARAMETER_PREFIXES[:2])


def borrows_parameters(optimizer: Any, stored: set[str]) -> bool:
    """Whether ``optimizer`` must read main copies that the checkpoint has only as the model's own.

    So it is for a distributed optimizer in fp32 training. Equal on all ranks.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    is_distributed = any(isinstance(part, DistributedOptimizer) for part in parts)
    return is_distributed and not any(
        name.startswith(MAIN_PARAMETER_PREFIXES[0]) for name in stored
    )


def use_torch_adam(optimizer: Any) -> None:
    """Put torch's AdamW, over the same groups, in the place of every fused Adam that has not
    stepped yet. No communication."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        fused = part.optimizer
        if fused is None or isinstance(fused, TORCH_ADAMS):
            continue
        settings = {name: fused.defaults[name] for name in ("lr", "betas", "eps", "weight_decay")}
        # Shards of a distributed optimizer are views, which the constructor refuses; Megatron puts
        # them into the groups afterwards, too.
        adam = torch.optim.AdamW([torch.nn.Parameter(torch.empty(0))], **settings)
        for group in fused.param_groups:
            for name, value in adam.defaults.items():
                group.setdefault(name, value)
        adam.param_groups = fused.param_groups
        part.optimizer = adam


def _let_adam_steps_pass(part: Any) -> None:
    """Let a distributed optimizer load torch Adam's state.

    Megatron copies every entry of the inner state, but leaves ``step`` out of what it copies from
    (a KeyError). Here the step is copied onto itself; :func:`restore_adam_steps` sets it.
    """
    copy_states = part._set_main_param_and_optimizer_states

    def copy_states_and_step(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][order]]
        copy_states(model_param, {"step": state["step"], **tensors})

    part._set_main_param_and_optimizer_states = copy_states_and_step


def prepare_for_loading(optimizer: Any) -> None:
    """Give every parameter Adam state to load into: a fresh optimizer has none, and Megatron reads
    the step from it while it builds the load plan. No communication."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        is_torch_adam = isinstance(part.optimizer, TORCH_ADAMS)
        if isinstance(part, DistributedOptimizer) and is_torch_adam:
            if "_set_main_param_and_optimizer_states" not in vars(part):  # a second load
                _let_adam_steps_pass(part)
    fill_adam_state(optimizer, step=1.0)  # Megatron would leave out a zero


def fill_adam_state(optimizer: Any, step: float) -> None:
    """Create the state that torch's Adam creates in its first step, where it is missing.

    No communication.
    """
    for adam in torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter].update(
                        step=step_counter(step, parameter, group),
                        exp_avg=torch.zeros_like(parameter.data),
                        exp_avg_sq=torch.zeros_like(parameter.data),
                    )


def restore_adam_steps(optimizer: Any, num_updates: int) -> None:
    """Set the number of updates in every group, and for torch's Adam in every parameter.

    After loading, Megatron lets all parameters share one tensor, which torch's Adam then increments
    once per parameter: a silent divergence. No communication.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        counts_in_groups = not isinstance(part.optimizer, TORCH_ADAMS)
        for group in part.param_groups:
            if counts_in_groups or "step" in group:
                group["step"] = num_updates
    for adam in torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if adam.state[parameter]:
                    counter = step_counter(float(num_updates), parameter, group)
                    adam.state[parameter]["step"] = counter
