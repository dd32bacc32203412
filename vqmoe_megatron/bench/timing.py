"""Timing several actions against each other: in turns, so that whatever the machine does meets all.

A round runs every action once; the next round starts with the next action, so that none always
follows the same one. The garbage collector rests while an action runs.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Action:
    """What is timed, and what is done before each time without being timed."""

    run: Callable[[], object]
    prepare: Callable[[], None] = lambda: None
    num_parts: int = 1  # the time is divided by it


@dataclass(frozen=True)
class Times:
    """Over the repeats, in milliseconds."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    num_repeats: int

    @property
    def row_fields(self) -> dict[str, float | int | None]:
        """What a result row says of times; bytes are counted by other benchmarks."""
        return {**asdict(self), "wire_bytes": None, "saved_bytes": None}


def time_in_turns(
    actions: Mapping[str, Action],
    num_repeats: int,
    num_warmup: int,
    look: Callable[[str], None] = lambda what: None,
) -> dict[str, Times]:
    """Return the times of every action over ``num_repeats`` rounds after ``num_warmup`` untimed.

    ``look`` is told of every round before it begins. On CUDA a time is that between two events on
    the stream, from an idle device to the action's end. No communication of its own.
    """
    names = list(actions)
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for turn in range(num_warmup + num_repeats):
        look(f"round {turn + 1} of {num_warmup + num_repeats}")
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time_ms = _time_once_ms(actions[name])
            if turn >= num_warmup:
                found[name].append(time_ms)
    return {name: _summary(times_ms) for name, times_ms in found.items()}


def _time_once_ms(action: Action) -> float:
    action.prepare()
    gc.disable()
    try:
        elapsed_ms = _device_ms if torch.cuda.is_available() else _host_ms
        return elapsed_ms(action.run) / action.num_parts
    finally:
        gc.enable()


def _host_ms(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)


def _device_ms(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _summary(times_ms: list[float]) -> Times:
    deciles = statistics.quantiles(times_ms, n=10, method="inclusive")
    return Times(statistics.median(times_ms), deciles[0], deciles[-1], len(times_ms))
