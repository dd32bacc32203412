"""Parameter groups that Megatron's schedule moves and DeepSpeed can partition."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer_param_scheduler import combine_param_group_overrides

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.engines.deepspeed.expert_groups import group_name
from vqmoe_megatron.engines.megatron.optimizer import optimizer_settings, parameter_overrides


def parameter_groups(
    config: RunConfig, model: torch.nn.Module, ep_size: int
) -> list[dict[str, Any]]:
    """The trained parameters, apart by how they learn and by whose they are, as Megatron has them.

    No communication. Groups of experts are marked ``moe`` and named as DeepSpeed's expert groups.
    """
    section = config.optimizer
    overrides = parameter_overrides(config, optimizer_settings(config))
    found: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own = combine_param_group_overrides(
            [override for key, override in overrides.items() if key.matches(parameter, name)]
        )
        is_expert = not getattr(parameter, "allreduce", True)
        group = found.setdefault(
            (is_expert, *sorted(own.items())),
            {"params": [], "wd_mult": 1.0, "max_lr": section.lr, "min_lr": section.min_lr, **own},
        )
        if is_expert:
            group |= {"moe": True, "name": group_name(ep_size)}
        group["params"].append(parameter)
    return list(found.values())
