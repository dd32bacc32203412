"""Whether an optimizer holds a model's parameters, also in the disguises of Megatron's optimizers.

Those of mixed precision hold fp32 main copies, to which the parameter's ``main_param`` points; the
distributed ones hold shards, views of the parameters' own storage or copies of some of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class HeldTensors:
    """What one torch optimizer holds."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
        self.has_any = bool(held)
        self._ids = {id(tensor) for tensor in held}
        # Storages without bytes share an address.
        self._storages = {t.untyped_storage().data_ptr() for t in held if t.numel()}

    def holds_one_of(self, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Whether one of them is held: itself, its main copy, or a view of it."""
        return any(
            id(p) in self._ids
            or id(getattr(p, "main_param", None)) in self._ids
            or p.untyped_storage().data_ptr() in self._storages
            for p in parameters
        )

    def is_a_stranger_to(self, parameters: Iterable[torch.nn.Parameter]) -> bool:
        """Whether it certainly holds none of them: they are trained, and no optimizer of Megatron
        keeps main copies of them, which might lie on another rank."""
        trained = [p for p in parameters if p.requires_grad]
        has_copies = any(hasattr(p, "main_param") for p in trained)
        return bool(trained) and not has_copies and not self.holds_one_of(trained)
