"""The steps since the last log line: their clocks, their layer statistics, and the record of them.

Saves, checks and evaluations are not part of a step; :meth:`LogWindow.pause` takes their time out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from vqmoe_megatron.checkpoint.state import Progress
from vqmoe_megatron.engines.megatron.step import StepResult
from vqmoe_megatron.runtime.host_memory import release_free_memory
from vqmoe_megatron.runtime.versions import clear_moe_log
from vqmoe_megatron.train.preflight import CheckedRun
from vqmoe_megatron.train.run_metrics import (
    LayerStatistics,
    LayerWindow,
    balance_loss,
    gather_layers,
    layer_record,
    peak_rss_bytes,
    write_routing,
)
from vqmoe_megatron.train.timed_iterator import TimedIterator


class LogWindow:
    """Collects steps until they are logged; then :meth:`restart`."""

    def __init__(self, run: CheckedRun) -> None:
        self.run = run
        self._layers = LayerWindow()
        self._started = time.perf_counter()
        self._core_seconds, self._num_steps = 0.0, 0

    def restart(self, iterators: list[TimedIterator]) -> None:
        """Begin an empty window. No communication."""
        if not torch.cuda.is_available():
            release_free_memory()
        for iterator in iterators:
            iterator.take_seconds()
        clear_moe_log()  # after a rollback it holds steps that no longer count
        self._layers = LayerWindow()
        self._started = time.perf_counter()
        self._core_seconds, self._num_steps = 0.0, 0

    def add(self, result: StepResult, layers: list[LayerStatistics]) -> None:
        """Count one step. No communication."""
        if self.run.config.finetune.mode != "head":  # layers without a backward pass record nothing
            self._layers.add(layers)
        self._core_seconds += result.core_seconds
        self._num_steps += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time spent inside out of the steps."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - began

    def record(
        self, progress: Progress, result: StepResult, iterators: list[TimedIterator]
    ) -> dict[str, float]:
        """Return the log record after ``result``, the latest step.

        Communicates over ``tp_dp_cp``, the pipeline group and the world: all ranks call it.
        """
        config = self.run.config
        elapsed = time.perf_counter() - self._started
        data_seconds = sum(iterator.take_seconds() for iterator in iterators)
        tokens_per_step = config.train.global_batch_size * config.model.seq_length
        num_microbatches = self.run.layout.num_microbatches(config.train)
        layers = gather_layers(self._layers)
        if torch.distributed.get_rank() == 0:
            try:
                addresses = config.code_memory.address_names
                write_routing(self.run.run_dir.routing, layers, addresses)
            except OSError as error:  # it is for plots only
                print(f"routing.npz could not be written: {error}; training goes on", flush=True)
        return {
            "iteration": progress.iteration,
            "consumed_tokens": progress.consumed_samples * config.model.seq_length,
            "consumed_samples": progress.consumed_samples,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": self._num_steps * tokens_per_step / elapsed,
            "step_time_ms": elapsed / self._num_steps * 1000,
            "overhead_share": (elapsed - self._core_seconds + data_seconds) / elapsed,
            "skipped_iterations": progress.skipped_iterations,
            "memory/peak_rss_bytes": peak_rss_bytes(),
            **balance_loss(config, self._num_steps, num_microbatches),
            **layer_record(layers),
        }
