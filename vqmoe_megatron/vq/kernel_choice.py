"""Whether a computation of this floor runs as a Triton kernel or in plain torch, and why not.

Kernels are for CUDA tensors of at most 32 bits, where Triton finds the C compiler that it needs. On
the CPU plain torch is the normal path and nothing is said; on CUDA the slower path is taken only
with a warning that names its reason.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Iterable

import torch


def use_kernel(*tensors: torch.Tensor | None) -> bool:
    """Return whether the Triton kernel takes these tensors; None stands for one left out.

    CUDA tensors that no kernel takes are warned about, once per reason. No communication.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if not all(tensor.is_cuda for tensor in given):
        return False
    obstacle = kernel_obstacle(tensor.dtype for tensor in given)
    if obstacle is None:
        return True
    _warn_once(obstacle)
    return False


def kernel_obstacle(dtypes: Iterable[torch.dtype]) -> str | None:
    """Return what keeps CUDA tensors of these dtypes from the kernels, None when nothing does."""
    if torch.float64 in dtypes:
        return "the kernels accumulate in fp32 and take no float64 tensors"
    return _triton_obstacle()


@functools.cache
def _triton_obstacle() -> str | None:
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if not torch.cuda.is_available():
        return None
    try:
        triton.runtime.driver.active.get_current_target()  # its first use compiles C
    except Exception as error:
        return (
            f"triton cannot compile its launchers ({error}): it needs a C compiler and Python's "
            "headers (gcc or CC, python3-dev)"
        )
    return None


@functools.cache
def _warn_once(obstacle: str) -> None:
    warnings.warn(
        f"vqmoe_megatron.vq runs in plain torch on CUDA, which is slower: {obstacle}", stacklevel=4
    )
