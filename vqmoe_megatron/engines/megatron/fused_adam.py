"""torch's Adam in one kernel on CUDA, where neither Transformer Engine nor Apex brings one.

Left to itself torch takes its foreach form there, which holds the square roots of all second
moments at once: a third of the optimizer's state more, in every step. The fused kernel holds
nothing, and its step counters lie on the device. On the CPU the plain loop stays, one parameter
after the other, whose curves are those of older releases to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


def torch_adams(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """Those inside a Megatron optimizer, which may be a chain."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, TORCH_ADAMS):
            yield part.optimizer


def fuse_adams(optimizer: Any, device_type: str) -> None:
    """Let torch's Adams run fused where parameters lie on ``cuda``; before their first step."""
    if device_type == "cuda":
        for adam in torch_adams(optimizer):
            for group in adam.param_groups:
                group["fused"] = True


def step_counter(value: float, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Adam's ``step`` of one parameter, fp32, where its group's kernel wants it."""
    return torch.full((), value, device=parameter.device if group.get("fused") else "cpu")
