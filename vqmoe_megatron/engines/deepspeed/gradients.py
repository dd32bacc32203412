"""The gradient of the step before DeepSpeed takes it: its norm, and how it is dropped."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from megatron.core import parallel_state

CLIP_EPS = 1e-6  # Megatron's and DeepSpeed's


class Gradients(Protocol):
    """Of one rank, after the step's last microbatch."""

    def norm(self) -> torch.Tensor:
        """fp32 scalar over the whole model, equal on all ranks; not finite where a gradient is
        not. Communicates."""

    def drop(self) -> None:
        """See to it that the coming step moves nothing. No communication."""


class ZeroGradients:
    """Those that ZeRO has cut: DeepSpeed measures, clips and drops them itself."""

    def __init__(self, engine: Any) -> None:
        self.optimizer = engine.optimizer

    def norm(self) -> torch.Tensor:
        """Communicates: one all-reduce of a scalar per parameter group."""
        norm = torch.as_tensor(self.optimizer.scaled_global_norm(), dtype=torch.float32)
        return torch.where(norm < 0, torch.inf, norm)  # its sign of a NaN

    def drop(self) -> None:
        """Nothing to do: a step whose norm is not finite DeepSpeed does not take."""


class WholeGradients:
    """Those of ZeRO 0, whole on every rank, clipped here: DeepSpeed's clipping of plain fp32
    training counts the experts of one rank alone, so ranks would clip by different norms."""

    def __init__(self, engine: Any, clip_grad: float) -> None:
        self.model, self.clip_grad = engine.module, clip_grad

    def norm(self) -> torch.Tensor:
        """Clips, too. Communicates: one all-reduce of a scalar over the expert-parallel group."""
        found = [p for p in self.model.parameters() if p.grad is not None]
        squares = {is_expert: self._sum_of_squares(found, is_expert) for is_expert in (False, True)}
        torch.distributed.all_reduce(
            squares[True], group=parallel_state.get_expert_model_parallel_group()
        )
        norm = (squares[False] + squares[True]).sqrt()
        factor = self.clip_grad / (norm + CLIP_EPS)
        if self.clip_grad > 0 and factor < 1:
            for parameter in found:
                parameter.grad.mul_(factor)
        return norm

    def _sum_of_squares(self, found: list[torch.nn.Parameter], is_expert: bool) -> torch.Tensor:
        own = [p.grad for p in found if is_expert != getattr(p, "allreduce", True)]
        total = torch.zeros((), device=torch.cuda.current_device())
        for gradient in own:
            total += gradient.float().square().sum()
        return total

    def drop(self) -> None:
        """An optimizer passes parameters without a gradient by."""
        for parameter in self.model.parameters():
            parameter.grad = None
