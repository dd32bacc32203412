"""The one place that adapts megatron-core to CPU + gloo. Nothing happens on import.

:func:`install_cpu_compat` is called explicitly, before any model is built, and refuses to run where
CUDA is usable. Each adaptation has its reason beside it; all of them were found by running.
"""

from __future__ import annotations

import functools
import os
import pickle
import queue
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vqmoe_megatron.runtime.cpu_compat.missing_names import name_missing_functions
from vqmoe_megatron.runtime.cpu_compat.pinned_memory import is_pinned, pin
from vqmoe_megatron.runtime.versions import results_queue_function

_installed = False
_stand_in = torch.device("cpu")  # what CUDA calls act on

FACTORIES = (
    "empty zeros ones full tensor arange rand randn randint randperm eye linspace "
    "empty_like zeros_like ones_like full_like rand_like randn_like as_tensor empty_strided"
).split()
BUILDERS = "tensor as_tensor new_tensor".split()  # of plain numbers
NEW_METHODS = "new_empty new_zeros new_ones new_full new_tensor".split()


def is_installed() -> bool:
    """Whether this process runs with the adaptations."""
    return _installed


def install_cpu_compat() -> None:
    """Make megatron-core's CUDA calls act on the CPU, once per process.

    Raises:
        ValueError: when CUDA is available, where Megatron runs as it is.

    No communication.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise ValueError(
            "install_cpu_compat() is for machines without CUDA; CUDA is available here"
        )
    # Megatron's jit_fuser is torch.compile, which needs a C++ compiler and minutes on the CPU. When
    # Megatron was imported before, by a user's part for instance, it has the functions already.
    if "megatron.core.jit" in sys.modules:
        torch.compiler.set_stance("force_eager")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    # Megatron refuses TP > 1 without it, although it only matters for CUDA streams.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # First the modules: their import tables torch's functions and must see the originals.
    _adapt_megatron_modules()
    _redirect_device_queries()
    _redirect_placement()
    _redirect_rng()
    _installed = True


@contextmanager
def in_place_of_cuda(device: str) -> Iterator[None]:
    """For a while, let ``meta`` take the CPU's part as the stand-in for CUDA.

    What is placed on ``cuda`` is then told apart from what stays on the host, as on a machine with
    a GPU; it has shapes and no contents (``meta_device`` answers what reads them). Host tensors can
    be pinned. One thread's choice is every thread's.

    Raises:
        ValueError: for another device, or without :func:`install_cpu_compat`.
    """
    global _stand_in
    if device not in ("cpu", "meta"):
        raise ValueError(f"device={device!r} cannot stand in for cuda: choose one of cpu, meta")
    if not _installed:
        raise ValueError("in_place_of_cuda needs install_cpu_compat(), which redirects CUDA calls")
    before, _stand_in = _stand_in, torch.device(device)
    try:
        yield
    finally:
        _stand_in = before


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Accept anything; the CPU has no streams to wait for."""


class _CpuStream:
    """A stream that is always done: CPU work is synchronous."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cpu")

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: _CpuEvent | None = None) -> _CpuEvent:
        # Megatron's all-to-all dispatcher waits for the event it gets here.
        return event or _CpuEvent()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _CpuStream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


class _CpuEvent(_CpuStream):
    """An event that has always happened."""

    record = wait = _nothing

    def elapsed_time(self, other: object) -> float:
        return 0.0


def _redirect_device_queries() -> None:
    torch.cuda.current_device = lambda: _stand_in
    torch.cuda.set_device = _nothing
    torch.cuda.synchronize = _nothing
    torch.cuda.empty_cache = _nothing
    torch.cuda.device_count = lambda: 1  # the async checkpoint writer divides by it
    torch.cuda.Stream = torch.cuda.ExternalStream = _CpuStream
    torch.cuda.Event = _CpuEvent
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _CpuStream()
    torch.cuda.stream = lambda stream: _CpuStream()
    torch.cuda.memory_allocated = torch.cuda.max_memory_allocated = lambda device=None: 0
    for name in ("range_push", "range_pop"):
        setattr(torch.cuda.nvtx, name, _nothing)
    torch.Tensor.record_stream = _nothing
    is_autocast_enabled = torch.is_autocast_enabled

    def autocasts(device_type: str = "cuda") -> bool:
        # Torch knows no autocast for meta tensors; they stand for CUDA's.
        return is_autocast_enabled("cuda" if device_type == "meta" else device_type)

    torch.is_autocast_enabled = autocasts


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _redirected(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` so that CUDA devices among its arguments become the stand-in; what is asked
    for in pinned memory is marked as such where that differs from other memory."""

    @functools.wraps(function)
    def on_stand_in(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _stand_in
        if any(_is_cuda(a) for a in args):
            args = tuple(_stand_in if _is_cuda(a) else a for a in args)
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
            return _pin_memory(function(*args, **kwargs))
        if function.__name__ in BUILDERS and _stand_in.type == "meta":
            return _built_on_host(function, args, kwargs)
        return function(*args, **kwargs)

    return on_stand_in


def _built_on_host(function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A tensor of plain numbers begins on the host, and a CUDA one is copied from there; torch
    makes a meta tensor of them without."""
    device = kwargs.pop("device", None)
    if device is None and function.__name__ == "new_tensor":
        device = args[0].device
    given = kwargs["data"] if "data" in kwargs else args[-1]
    kwargs["device"] = device if isinstance(given, torch.Tensor) else "cpu"
    made = function(*args, **kwargs)
    return made if device is None else made.to(device)


def _pin_memory(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor if _stand_in.type == "cpu" else pin(tensor)


def _cuda(moved: Any, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.cuda`` and ``Module.cuda``."""
    return moved if _stand_in.type == "cpu" else moved.to(_stand_in)


def _redirect_placement() -> None:
    # Wrapping the functions costs nothing per op; a TorchFunctionMode is thread-local and does.
    for name in FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name)))
    for name in NEW_METHODS:
        setattr(torch.Tensor, name, _redirected(getattr(torch.Tensor, name)))
    torch.Tensor.to = _redirected(torch.Tensor.to)
    torch.nn.Module.to = _redirected(torch.nn.Module.to)
    torch.Tensor.cuda = torch.nn.Module.cuda = _cuda
    torch.Tensor.pin_memory = _pin_memory
    torch.Tensor.is_pinned = is_pinned
    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers compare against 'torch.cuda.FloatTensor' and its kin.
        if dtype is None:
            # Under a TorchFunctionMode torch itself calls what is here in its place once more.
            return "torch.cuda." + type_of(self).split(".")[-1]
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return type_of(self, dtype, *args, **kwargs)

    torch.Tensor.type = cuda_type


def _redirect_rng() -> None:
    # Megatron forks the CUDA generator for dropout and recompute; the CPU generator takes its part.
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    # Not torch.manual_seed, which itself calls torch.cuda.manual_seed_all.
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    torch.cuda.manual_seed_all = torch.cuda.manual_seed
    torch.cuda.initial_seed = torch.initial_seed


def _adapt_megatron_modules() -> None:
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    tensor_parallel_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(
        state
    )
    name_missing_functions()

    def maybe_move_tensor_to_cpu(
        tensor: Any, as_numpy: bool = False, record_stream: bool = False
    ) -> Any:
        # The original converts CUDA tensors only, and gloo's all_to_all needs the plain numbers.
        if isinstance(tensor, torch.Tensor) and as_numpy:
            return tensor.numpy()
        return tensor

    moe_utils.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu

    name = results_queue_function(filesystem_async)
    setattr(filesystem_async, name, lambda: _results_of(os.getpid()))


@functools.cache
def _results_of(process_id: int) -> _ForkedResults:
    """One for each process that saves, also where several were forked from one."""
    return _ForkedResults()


class _ForkedResults:
    """Carries the results of a checkpoint writer, this process or a fork of it, through a file.

    Megatron's queue of a multiprocessing manager imports all of torch once more in every rank (3 s
    of processor time at the first save) and outlives a rank that is killed. A pipe would hold up a
    writer that has more to say than fits in. The file has no name, and a fork shares its position.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()

    def put(self, results: Any) -> None:
        pickle.dump(results, self._file)
        self._file.flush()

    def get_nowait(self) -> Any:
        self._file.seek(0)
        content = self._file.read()
        self._file.seek(0)
        self._file.truncate()
        if not content:
            raise queue.Empty
        try:
            return pickle.loads(content)  # noqa: S301 (written by this process or its own fork)
        except (EOFError, pickle.UnpicklingError):  # the fork was killed while it wrote
            raise queue.Empty from None
