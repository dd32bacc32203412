"""What a captured function is recorded in: CUDA's graphs. Another form, which tests use, is in
recorded_graph.py."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch


class Graph(ABC):
    """Two passes over static buffers; the second one's work belongs to the first one's."""

    @abstractmethod
    def warm_up(self, work: Callable[[], None]) -> None:
        """Run ``work`` where captures run, so that all that a first run chooses, loads or allocates
        is there."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record ``work``; nothing of it is done for good until what is returned is called."""


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    """One for all captures: a pass must be captured where its forward pass was, and every stream
    that multiplies has a workspace of cuBLAS."""
    return torch.cuda.Stream()


class CudaGraph(Graph):
    """CUDA's graphs. Passes share one memory pool."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run on the stream of the captures; the current one waits for it."""
        current, stream = torch.cuda.current_stream(), _capture_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            work()
        current.wait_stream(stream)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture; work of other threads (a data loader's copies, NCCL's watchdog) goes on.

        Collectives inside must be NCCL's.

        Raises:
            RuntimeError: when CUDA refuses something of ``work``; torch's message is in it.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph,
                pool=self._pool,
                stream=_capture_stream(),
                capture_error_mode="thread_local",
            ):
                work()
        except RuntimeError as error:
            raise RuntimeError(
                f"this cannot be captured in a CUDA graph: {error}; train without "
                "(train.cuda_graphs=false)"
            ) from error
        return graph.replay
