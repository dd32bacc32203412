"""Bytes that torch's operators read and write, counted where they are dispatched."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GATHERS = ("index_select", "gather", "embedding", "index")  # read as much as they write
UNTOUCHED = ("detach", "empty", "empty_like", "new_empty", "_unsafe_view")
WRITE_ONLY = ("zero_", "fill_", "zeros", "zeros_like", "new_zeros", "full_like")


class BytesMoved(TorchDispatchMode):
    """``read`` and ``written`` bytes; every operand counts once per operator, views not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        aliases = [returned.alias_info for returned in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if is_view or name in UNTOUCHED:
            return result
        written = sum(t.nbytes for t in _tensors(result))
        given = {key: value for key, value in kwargs.items() if key != "out"}
        operands = {id(t): t for t in _tensors((args, given))}
        if name in WRITE_ONLY:
            operands = {}
        if name == "copy_":
            operands.pop(id(args[0]))
        sizes = [t.nbytes for t in operands.values()]
        if name in GATHERS:
            sizes[0] = written
        self.read += sum(sizes)
        self.written += written
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
