"""Answers for what reads a tensor on the ``meta`` device, which has a shape and no contents.

A step whose ``cuda`` is ``meta`` (``in_place_of_cuda``) differs from one on a GPU in two things.
What comes back to the host is made up, as in a step that goes well: a flag is True, a count 0, a
measure 1.0. And the plain torch of the CPU runs, not the kernels of CUDA. Shapes that would follow
from contents (``nonzero``, ``masked_select``, a boolean index) have no answer, and torch says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten


@contextmanager
def answered_reads() -> Iterator[None]:
    """For a while, what reads ``meta`` tensors on the host has a result."""
    with _Operators(), _Numbers():
        yield


class _Numbers(TorchFunctionMode):
    """Where numbers become tensors and tensors numbers before a dispatch mode sees any of it.

    ``torch.tensor`` reads tensors in a list; a list as an index is copied to the device. Backward
    passes are not seen here: there the first raises, and the second goes unseen.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "tensor" and not isinstance(args[0], torch.Tensor):
            args = (tree_map_only(torch.Tensor, lambda read: read.item(), args[0]), *args[1:])
        elif name in ("__getitem__", "__setitem__") and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(i) if isinstance(i, list) else i for i in index)
            args = (args[0], index, *args[2:])
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, or answer it."""
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return made_up(args[0].dtype)
        if func is aten.equal.default and args[0].is_meta:
            return True
        if func is aten._to_copy.default and args[0].is_meta:
            if torch.device(kwargs.get("device") or "meta").type == "cpu":
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.full(args[0].shape, made_up(dtype), dtype=dtype, device="cpu")
        if func is aten.copy_.default and args[1].is_meta and not args[0].is_meta:
            return args[0].fill_(made_up(args[0].dtype))
        return func(*args, **kwargs)


def made_up(dtype: torch.dtype) -> bool | float | int:
    """What an element of ``dtype`` is taken for."""
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 0
