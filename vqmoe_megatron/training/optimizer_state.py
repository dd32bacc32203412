"""What Megatron's optimizer checkpoints need when the inner optimizer is torch's Adam.

On CUDA Megatron prefers Transformer Engine's or Apex's fused Adam, whose state needs none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
# fully_reshardable is the one layout-free format that torch's Adam can be saved in; the prefixless
# chain keeps dense and expert optimizers apart by parameter name.
OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


def _torch_adams(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, TORCH_ADAMS):
            yield part.optimizer


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
        if isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, TORCH_ADAMS):
            _let_adam_steps_pass(part)
    for adam in _torch_adams(optimizer):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter].update(
                        step=torch.tensor(0.0),
                        exp_avg=torch.zeros_like(parameter.data),
                        exp_avg_sq=torch.zeros_like(parameter.data),
                    )


def restore_adam_steps(optimizer: Any, num_updates: int) -> None:
    """Give every parameter its own step counter.

    After loading, Megatron lets all parameters share one tensor, which torch's Adam then increments
    once per parameter: a silent divergence. No communication.
    """
    for adam in _torch_adams(optimizer):
        for state in adam.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(num_updates))
