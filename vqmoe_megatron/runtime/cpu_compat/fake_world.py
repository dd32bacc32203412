"""What torch and Megatron do otherwise while one rank of a world that does not exist takes a step.

Each has its reason beside it. None of them calls or skips a collective of the step, so what is
counted is what the real code calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random as megatron_random


@contextmanager
def fake_ranks() -> Iterator[None]:
    """Replace, for a while, what cannot work on a fake process group alone: objects travel as
    bytes, and nobody sends any."""
    with mock.patch.object(torch.distributed, "all_gather_object", _all_say_the_same):
        yield


@contextmanager
def fake_world() -> Iterator[None]:
    """Replace, for a while, what cannot work on fake tensors or on a fake process group."""
    with ExitStack() as stack:
        stack.enter_context(fake_ranks())
        for owner, name, replacement in (
            # Generator states are bytes too; nothing is drawn.
            (megatron_random, "_get_cuda_rng_state", _no_state),
            (megatron_random, "_set_cuda_rng_state", _nothing),
            (torch, "get_rng_state", _no_state),
            (torch, "set_rng_state", _nothing),
            # Torch swaps a fake parameter for its converted self and refuses where it is known
            # by others; on one device only a dtype can change.
            (torch.nn.Module, "_apply", _apply),
            # Without Apex Megatron makes a tensor of each gradient's norm, as a number.
            (clip_grads, "multi_tensor_applier", _norm_of_shape_one),
            # An address tells whether a tensor was replaced; so does the object.
            (torch.Tensor, "data_ptr", _identity),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Accept anything."""


def _identity(tensor: torch.Tensor) -> int:
    return id(tensor)


def _norm_of_shape_one(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return torch.ones(1), None


def _no_state(*args: Any, **kwargs: Any) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.uint8)


def _all_say_the_same(found: list, mine: Any, group: object = None) -> None:
    # In Megatron's optimizer all ranks tell their kinds of parameter groups, and those of experts
    # exist somewhere.
    if isinstance(mine, list) and mine and not any(is_expert for _, is_expert in mine):
        mine = [*mine, (mine[0][0], True)]  # a stage without experts learns of them from others
    found[:] = [mine] * len(found)


def _apply(
    self: torch.nn.Module, convert: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> torch.nn.Module:
    for child in self.children() if recurse else ():
        child._apply(convert)
    for parameter in self._parameters.values():
        if parameter is not None:
            with torch.no_grad():
                converted = convert(parameter)
            if converted.dtype != parameter.dtype:
                parameter.data = converted
    for name, buffer in self._buffers.items():
        if buffer is not None:
            self._buffers[name] = convert(buffer)
    return self
