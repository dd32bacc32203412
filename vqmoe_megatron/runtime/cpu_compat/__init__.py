"""The one place that adapts megatron-core 0.16.1 to CPU + gloo. Nothing happens on import.

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
from collections.abc import Callable
from typing import Any

import torch

from vqmoe_megatron.runtime.cpu_compat.missing_names import name_missing_functions

_installed = False

FACTORIES = (
    "empty zeros ones full tensor arange rand randn randint randperm eye linspace "
    "empty_like zeros_like ones_like full_like rand_like randn_like as_tensor empty_strided"
).split()
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
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu
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


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _to_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` so that CUDA devices and pinned memory among its arguments become CPU."""

    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if any(_is_cuda(a) for a in args):
            args = tuple("cpu" if _is_cuda(a) else a for a in args)
        return function(*args, **kwargs)

    return on_cpu


def _redirect_placement() -> None:
    # Wrapping the functions costs nothing per op; a TorchFunctionMode is thread-local and does.
    for name in FACTORIES:
        setattr(torch, name, _to_cpu(getattr(torch, name)))
    for name in NEW_METHODS:
        setattr(torch.Tensor, name, _to_cpu(getattr(torch.Tensor, name)))
    torch.Tensor.to = _to_cpu(torch.Tensor.to)
    torch.nn.Module.to = _to_cpu(torch.nn.Module.to)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    type_of = torch.Tensor.type

    def cuda_type(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers compare against 'torch.cuda.FloatTensor' and its kin.
        if dtype is None:
            return type_of(self).replace("torch.", "torch.cuda.", 1)
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

    filesystem_async._get_write_results_queue = lambda: _results_of(os.getpid())


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
