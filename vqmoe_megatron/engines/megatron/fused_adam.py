"""torch's Adam in one kernel, where neither Transformer Engine nor Apex brings one.

Left to itself torch takes its foreach form on CUDA, which holds the square roots of all second
moments at once: a third of the optimizer's state more, in every step. On the CPU it takes a plain
loop, whose dozen passes over a weight take six times as long as the fused kernel's one. That kernel
holds nothing, and its step counters lie with the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

FUSED_DEVICES = ("cpu", "cuda")  # meta tensors have none
TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)


def torch_adams(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """Those inside a Megatron optimizer, which may be a chain."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(part.optimizer, TORCH_ADAMS):
            yield part.optimizer


def fuse_adams(optimizer: Any, device_type: str) -> None:
    """Let torch's Adams run fused where there is a kernel; before their first step."""
    if device_type in FUSED_DEVICES:
        for adam in torch_adams(optimizer):
            for group in adam.param_groups:
                group["fused"] = True


def step_counter(value: float, parameter: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Adam's ``step`` of one parameter, fp32, where its group's kernel wants it."""
    return torch.full((), value, device=parameter.device if group.get("fused") else "cpu")
