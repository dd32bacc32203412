"""What a training step asks of the host, and what it mixes that a GPU would refuse.

While a :class:`DevicePurity` is entered, every operator of torch is looked at where it is
dispatched, in the backward pass as well:

    mixed devices   a tensor of the device meets one of the host (0-dimensional ones may); raises
    host collective a collective of a host tensor, which NCCL refuses; raises
    host read       the host waits for the device: ``item``, ``tolist``, ``bool``, ``.cpu()``,
                    ``equal``, ``nonzero``, a boolean index, counts whose sum nobody knows
    pageable copy   host to device from memory that is not pinned: the host waits, too

The device is CUDA, or ``meta`` where that stands in for CUDA (``cpu_compat``): the tests of this
machine and the proof on a GPU look with the same eyes. What a kernel or torch itself does inside of
one operator is not seen; on a GPU ``torch.cuda.set_sync_debug_mode`` tells.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten

# Operators that read their first tensor on the host, whatever else they are given.
READS = {
    aten._local_scalar_dense.default: "item",
    aten.equal.default: "equal",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique_consecutive",
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
COPIES = {aten._to_copy.default, aten.copy_.default}
PASSED_OVER = ("torch.", "contextlib", "functools", "vqmoe_megatron.runtime.cpu_compat", __name__)


class ImpureStep(RuntimeError):
    """A step did what a GPU refuses."""


@dataclass(frozen=True)
class Seen:
    """One thing that a step asked of the host."""

    kind: str  # host read | pageable copy
    operator: str
    place: str  # module:function, of the code outside of torch that did it


class DevicePurity(TorchDispatchMode):
    """Context manager; ``seen`` lists what the code inside of it asked of the host, in order.

    Args:
        device_type: ``cuda``, or ``meta`` where that stands in for it.

    Entered code raises :class:`ImpureStep` for mixed devices. No communication.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.seen: list[Seen] = []

    def unexpected(self, allowed: Iterable[str]) -> list[Seen]:
        """What was seen at places that are not ``allowed``, each once."""
        known = set(allowed)
        return list(dict.fromkeys(one for one in self.seen if one.place not in known))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at ``func``, then run it.

        Raises:
            ImpureStep: for what a GPU refuses.
        """
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            if any(not self._is_on_device(t) for t in _tensors((args, kwargs))):
                raise ImpureStep(f"{func} of a host tensor, at {_place()}: NCCL takes none")
        elif func in COPIES:
            self._look_at_copy(func, args, kwargs)
        elif any(map(self._is_on_device, _tensors((args, kwargs)))):
            self._look_at_operands(func, args, kwargs)
        return func(*args, **kwargs)

    def _is_on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == self.device_type

    def _note(self, kind: str, operator: str) -> None:
        self.seen.append(Seen(kind, operator, _place()))

    def _look_at_operands(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        operands = args
        if func in INDEXING:
            self._look_at_index(func, args)
            operands = (args[0], *args[2:])  # a host index is copied, not refused
        strangers = [
            str(tuple(tensor.shape))
            for tensor in _tensors((operands, kwargs))
            if tensor.dim() and not self._is_on_device(tensor)
        ]
        if strangers:
            raise ImpureStep(
                f"{func} mixes tensors of {self.device_type} with host tensors of shape "
                f"{', '.join(strangers)}, at {_place()}"
            )
        if func in READS and self._is_on_device(args[0]):
            self._note("host read", READS[func])
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self._note("host read", "repeat_interleave")

    def _look_at_index(self, func: Any, args: Any) -> None:
        for index in _tensors(args[1]):
            if not self._is_on_device(index):
                self._note("pageable copy", "a host index")
            elif index.dtype in (torch.bool, torch.uint8):
                # One number where a mask says so is masked_fill.
                is_fill = func is not aten.index.Tensor and args[2].numel() == 1
                if not is_fill or any(args[3:4]):
                    self._note("host read", "boolean index")

    def _look_at_copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if func is aten.copy_.default:
            source, target = args[1], args[0].device
            is_async = bool(args[2] if len(args) > 2 else kwargs.get("non_blocking"))
            # Into memory that is not pinned the driver waits all the same.
            is_async = is_async and (target.type != "cpu" or args[0].is_pinned())
        else:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            is_async = bool(kwargs.get("non_blocking"))  # to the host torch then allocates pinned
        if self._is_on_device(source) and target.type == "cpu":
            if not is_async:
                self._note("host read", "copy to the host")
        elif not self._is_on_device(source) and target.type == self.device_type:
            if not (is_async and source.is_pinned()):
                self._note("pageable copy", "copy to the device")


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(held) if isinstance(leaf, torch.Tensor))


def _place() -> str:
    """``module:function`` of the innermost frame that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        is_passed_over = module == "torch" or module.startswith(PASSED_OVER)
        if not is_passed_over and not function.startswith("<"):
            return f"{module}:{function}"
        frame = frame.f_back
    return "?"
