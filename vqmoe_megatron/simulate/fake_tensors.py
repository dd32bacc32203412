"""Tensors without contents: what stands for everything that only contents could tell.

Torch's ``FakeTensorMode`` gives every tensor a shape and a dtype and no memory, so that a rank of
any model fits here. Where a program reads a value, the mode raises; the answers below are those of
a step that goes well. None of them decides what is sent: shapes do, and the splits of rows, which
``engines.py`` supplies. What the program itself wrote into a tensor of one element, such as the
kind of attention mask that recompute hands through, torch remembers, and then that is the answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class FakeValues(TorchDispatchMode):
    """Answers, for fake tensors only, the operators whose result is in the data."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A flag is True, a count 0 and a measure 1.0; every element of a mask may be set."""
        if args and isinstance(args[0], FakeTensor):
            tensor = args[0]
            if tensor.constant is not None:  # written by the program, not computed
                return func(*args, **(kwargs or {}))
            if func is aten._local_scalar_dense.default:
                if tensor.dtype == torch.bool:
                    return True  # all gradients are finite
                return 1.0 if tensor.dtype.is_floating_point else 0  # a norm; no stop is asked for
            if func is aten.nonzero.default:
                return tensor.new_zeros((tensor.numel(), tensor.dim()), dtype=torch.int64)
        return func(*args, **(kwargs or {}))
