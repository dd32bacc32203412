"""Where tests run Triton kernels: interpreted on the CPU, and on a CUDA device when there is one.

Triton decides at import whether it interprets, so interpreted kernels run in a process of their
own, started at first use and kept. ``run_kernel`` hands it a function of the package by name, with
tensors as arguments.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

PLACES = ["interpreter", "cuda"]


def run_kernel(place: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Return what ``function`` returns at that place, tensors on the CPU; skips without one."""
    skip_unless_possible(place)
    if place == "cuda":
        moved = [_to(argument, "cuda") for argument in args]
        kwargs = {name: _to(argument, "cuda") for name, argument in kwargs.items()}
        return _to(function(*moved, **kwargs), "cpu")
    return _interpreter().submit(function, *args, **kwargs).result(timeout=120)


def skip_unless_possible(place: str) -> None:
    """Skip the test, with the reason, when kernels cannot run at this place."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not importable")
    if place == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def _to(value: Any, device: str) -> Any:
    """Move a tensor, or those in a tuple. The copy keeps strides and what lies between them."""
    if isinstance(value, tuple):
        return tuple(_to(part, device) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    storage = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())


@functools.cache
def _interpreter() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(
        max_workers=1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_interpret_here,
    )


def _interpret_here() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
