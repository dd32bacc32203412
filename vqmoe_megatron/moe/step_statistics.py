"""Statistics of a step keep fp32: Megatron's Float16Module casts whole models, buffers included.

A bf16 number has 8 significant bits, so a count would stop growing at 256.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

HALVES = (torch.bfloat16, torch.float16)


class KeepsStatistics(torch.nn.Module):
    """Base of modules whose non-persistent buffers are sums over a step.

    They follow device moves and a cast to fp64, not one to half precision. Cast a model before it
    trains, as Megatron does: what a buffer holds at that moment is rounded once.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self._non_persistent_buffers_set:
            buffer = self._buffers[name]
            if buffer is not None and buffer.dtype in HALVES:
                self._buffers[name] = buffer.float()
        return self
