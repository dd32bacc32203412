"""A second CUDA stream, for work that needs nothing of what the first one is doing."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch


class SideStream:
    """Work beside the current stream. Without CUDA everything is done in turn."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    @contextlib.contextmanager
    def fork(self) -> Iterator[None]:
        """Queue what follows on the side, behind what the current stream was given so far."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def join(self, *results: torch.Tensor) -> None:
        """Let the current stream wait for the side; it may then use ``results``, made there."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream()
        current.wait_stream(self.stream)
        for result in results:
            result.record_stream(current)


@functools.cache
def side_stream() -> SideStream:
    """The one that all layers of this process share: more would only compete."""
    return SideStream()
