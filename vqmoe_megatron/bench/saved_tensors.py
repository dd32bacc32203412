"""Bytes that a forward pass leaves for its backward pass: counted, not estimated.

Two places hold tensors for a backward pass:
    1. what operations save: seen by torch's saved-tensor hooks, and kept here only as long as the
       graph keeps it;
    2. what custom functions keep on their context, in closures for instance, of which the hooks
       know nothing: found by walking the graph from the output.

A storage counts once, with all its bytes, however many tensors look at it.
"""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch


class _Saved:
    """Stands for a saved tensor in the graph, which alone keeps it alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        # Detached: an operation's own result would hold the operation, and that this object, in a
        # circle that nothing ever frees.
        self.tensor = tensor.detach()


def saved_bytes(
    forward: Callable[[], torch.Tensor], excluded: Iterable[torch.Tensor]
) -> tuple[int, torch.Tensor]:
    """Run a forward pass and count what it keeps.

    Args:
        forward: returns the output that a backward pass would start from.
        excluded: tensors whose storages do not count: parameters, buffers, the input.

    Returns:
        The bytes, and the output, so that a caller can go on with it. Communicates as ``forward``.
    """
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = forward()
    tensors = [saved.tensor for saved in alive]
    tensors += _on_contexts(output)
    num_bytes = _storages(tensors)
    for key in _storages(excluded):
        num_bytes.pop(key, None)
    return sum(num_bytes.values()), output


def _storages(tensors: Iterable[torch.Tensor]) -> dict[tuple[torch.device, int], int]:
    """Bytes of every storage by its place."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return storages


def _on_contexts(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """Tensors among the attributes of the custom functions that ``output`` depends on."""
    seen: set[object] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        yield from _tensors_in(list(getattr(node, "__dict__", {}).values()), set())


def _tensors_in(held: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Tensors that an object holds: through containers, dataclasses and closures."""
    if id(held) in seen:
        return
    seen.add(id(held))
    parts: list[object] = []
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, (list, tuple, set)):
        parts = list(held)
    elif isinstance(held, dict):
        parts = list(held.values())
    elif dataclasses.is_dataclass(held) and not isinstance(held, type):
        parts = [getattr(held, entry.name) for entry in dataclasses.fields(held)]
    elif isinstance(held, types.FunctionType):
        parts = [cell.cell_contents for cell in held.__closure__ or ()]
    for part in parts:
        yield from _tensors_in(part, seen)
