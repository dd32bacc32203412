"""How long training waits for its data."""

from __future__ import annotations

import time
from collections.abc import Iterator

from vqmoe_megatron.tasks.task import Batch


class TimedIterator:
    """An iterator that knows how long its consumer waited for it."""

    def __init__(self, iterator: Iterator[Batch]) -> None:
        self._iterator = iterator
        self._seconds = 0.0

    def __iter__(self) -> TimedIterator:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = next(self._iterator)
        self._seconds += time.perf_counter() - started
        return batch

    def take_seconds(self) -> float:
        """Return the seconds waited since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
