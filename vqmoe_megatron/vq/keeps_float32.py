"""Modules whose floating numbers keep fp32: Megatron's Float16Module casts whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class KeepsFloat32(torch.nn.Module):
    """Follows device moves and a cast to fp64 only: codes move in steps below bf16's."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.dtype != tensor.dtype and moved.dtype != torch.float64:
                return tensor.to(moved.device)
            return moved

        return super()._apply(keep_dtype, recurse)
