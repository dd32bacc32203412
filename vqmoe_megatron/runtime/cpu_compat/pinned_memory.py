"""Which host tensors count as pinned, on a machine where no memory is.

A copy from pinned memory does not hold up the host, a copy from other memory does. Where the
``meta`` device stands in for CUDA the difference is kept, so that a step can be judged by it.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

_pinned: set[int] = set()  # addresses of storages, as long as they live


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a host tensor that counts as pinned, or the tensor if it does already."""
    if is_pinned(tensor):
        return tensor
    copied = tensor.clone()
    storage = copied.untyped_storage()
    _pinned.add(storage._cdata)
    weakref.finalize(storage, _pinned.discard, storage._cdata)
    return copied


def is_pinned(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether the tensor, or what it is a view of, was pinned."""
    return tensor.device.type == "cpu" and tensor.untyped_storage()._cdata in _pinned
