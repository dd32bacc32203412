"""A graph that runs its work each time, and refuses what CUDA's graphs would get wrong.

On a machine without CUDA it takes the graph's place in tests: another operation, shape or address
of a tensor from outside than at the capture is an error, and so is an operation that waits for the
device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.distributed import distributed_c10d
from torch.utils._python_dispatch import TorchDispatchMode

from vqmoe_megatron.runtime.device_purity import READS
from vqmoe_megatron.runtime.graphs import Graph

SPOILT = 0xFF  # bytes of a NaN of any width, or of -1


class RecordedGraph(Graph):
    """Runs the work each time and holds it against the capture."""

    def __init__(self) -> None:
        self._made: dict[int, torch.UntypedStorage] = {}  # in this replay of the passes

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run it."""
        work()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run and record ``work``; the first pass of a replay spoils what the last one made, as a
        graph writes over it."""
        is_first = not self._made
        record = _Record(self._made)
        with record:
            work()

        def replay() -> None:
            if is_first:
                for storage in self._made.values():
                    storage.fill_(SPOILT)
                self._made.clear()
            again = _Record(self._made)
            with again:
                work()
            again.must_equal(record)

        return replay


class _Record(TorchDispatchMode):
    """Operations with the shapes of their tensors, and the addresses of those from outside."""

    def __init__(self, made: dict[int, torch.UntypedStorage]) -> None:
        super().__init__()
        self.made = made
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = str(function)
        if function in READS:
            raise ValueError(f"{name} waits for the device: it cannot be captured in a graph")
        if _is_inside_a_collective(name):
            return function(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        inputs = [self._seen(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        result = function(*args, **(kwargs or {}))
        outside = {leaf.untyped_storage()._cdata for leaf in leaves if torch.is_tensor(leaf)}
        for leaf in torch.utils._pytree.tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in outside:  # a view or an in-place result is not new
                    self.made[storage._cdata] = storage  # kept, so that no other gets its number
        self.operations.append((name, tuple(inputs)))
        return result

    def _seen(self, tensor: torch.Tensor) -> tuple:
        made = tensor.untyped_storage()._cdata in self.made
        place = None if made or tensor.numel() == 0 else tensor.data_ptr()
        return tuple(tensor.shape), tensor.dtype, tensor.stride(), place

    def must_equal(self, first: _Record) -> None:
        """Raise ``ValueError`` at the first difference from the capture."""
        pairs = zip(self.operations, first.operations, strict=False)
        for number, (now, then) in enumerate(pairs):
            if now != then:
                raise ValueError(
                    f"operation {number} of a captured function changed: {then} at the capture, "
                    f"{now} now; a graph would have repeated the first"
                )
        if len(self.operations) != len(first.operations):
            raise ValueError(
                f"a captured function did {len(first.operations)} operations at the capture and "
                f"{len(self.operations)} now"
            )


def _is_inside_a_collective(name: str) -> bool:
    """Whether an operation is gloo's own, on copies that it made: NCCL has kernels for that."""
    if name.startswith("c10d."):
        return False
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != distributed_c10d.__file__:
        frame = frame.f_back
    return frame is not None
