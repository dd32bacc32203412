"""One rank's training run: build, resume, step, report.

1. Build model, optimizer, schedule and data for the layout.
2. Load the newest checkpoint, or initialise the codebooks from the first microbatch.
3. Evaluate, then step until the end or a stop request; log, evaluate and save on the way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from vqmoe_megatron.moe.codebook_sync import CodebookSync
from vqmoe_megatron.runtime.host_memory import release_free_memory
from vqmoe_megatron.training.batches import TimedIterator, evaluation_windows, training_iterators
from vqmoe_megatron.training.checkpoint import (
    Progress,
    TrainingState,
    load_checkpoint,
    save_checkpoint,
)
from vqmoe_megatron.training.evaluate import evaluate
from vqmoe_megatron.training.model_builder import build_model, build_transformer_config
from vqmoe_megatron.training.optimizer import build_optimizer
from vqmoe_megatron.training.preflight import CheckedRun
from vqmoe_megatron.training.run_metrics import (
    LayerWindow,
    balance_loss,
    gather_layers,
    layer_metrics,
    peak_rss_bytes,
    write_routing,
)
from vqmoe_megatron.training.run_report import RunReport
from vqmoe_megatron.training.stop_requests import NO_REQUEST, REASONS, StopRequests
from vqmoe_megatron.training.train_step import StepResult, TrainStep, run_microbatches


@dataclass(frozen=True)
class Outcome:
    """How the loop ended."""

    state: str  # completed | requeue
    iteration: int
    reason: str


class Trainer:
    """Build with a joined world and process groups; then call :meth:`train` once."""

    def __init__(self, run: CheckedRun, stop_requests: StopRequests) -> None:
        self.run = run
        self.config = run.config
        self.stop_requests = stop_requests
        train = self.config.train
        # As Megatron-LM: pipeline stages draw different dropout masks.
        stage_seed = train.seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
        torch.manual_seed(stage_seed)
        model_parallel_cuda_manual_seed(stage_seed)
        # Megatron's tracker is global and sized for the first model of a process.
        get_moe_layer_wise_logging_tracker().clear()
        self.codebook_sync = CodebookSync(applies_at_once=False)
        transformer = build_transformer_config(self.config, run.layout)
        transformer.finalize_model_grads_func = self.codebook_sync
        self.model = build_model(self.config, transformer, run.layout)
        self.optimizer, self.scheduler = build_optimizer(self.config, self.model)
        transformer.grad_scale_func = self.optimizer.scale_loss
        if self.config.optimizer.overlap_grad_reduce:
            transformer.no_sync_func = [chunk.no_sync for chunk in self.model]
            if len(self.model) == 1:
                transformer.no_sync_func = transformer.no_sync_func[0]
        self.num_microbatches = run.layout.num_microbatches(
            train.global_batch_size, train.micro_batch_size
        )
        self.step = TrainStep(
            self.model,
            self.optimizer,
            self.scheduler,
            self.codebook_sync,
            self.num_microbatches,
            self.config.model.seq_length,
            train.micro_batch_size,
            train.global_batch_size,
        )
        self.state = TrainingState(self.model, self.optimizer, self.scheduler)
        self.progress = Progress(iteration=0, consumed_samples=0, skipped_iterations=0)
        self.window = LayerWindow()

    @property
    def num_parameters(self) -> int:
        """Parameters on this rank."""
        return sum(p.numel() for chunk in self.model for p in chunk.parameters())

    def resume(self) -> Path | None:
        """Load the checkpoint that the preflight chose, if any, and return its folder.

        Communicates over the world.
        """
        folder = self.run.resume_from
        if folder is not None:
            self.progress = load_checkpoint(folder, self.state)
        return folder

    def train(self, report: RunReport) -> Outcome:
        """Run to the end or to a stop request. Communicates over every group of the layout."""
        train = self.config.train
        chunks = len(self.model)
        for chunk in self.model:
            chunk.train()
        if self.progress.iteration == 0:
            self._initialize_codebooks()
        self.iterators = [
            TimedIterator(iterator)
            for iterator in training_iterators(
                self.config, self.run.corpus, self.progress.consumed_samples, chunks
            )
        ]
        windows = evaluation_windows(self.config, self.run.corpus) if train.eval_iters else None
        if windows is not None:
            report.message(f"validation: {windows.description}")
            if self.progress.iteration == 0:
                start = {"iteration": 0, "consumed_tokens": 0, "consumed_samples": 0}
                report.log({**start, **evaluate(self.model, windows)})
        self._started = time.perf_counter()
        self._core_seconds, self._steps_in_window = 0.0, 0

        outcome = None
        while outcome is None:
            if self.progress.iteration >= train.train_iters:
                outcome = Outcome("completed", self.progress.iteration, "all iterations done")
                break
            result = self.step(self.iterators, self.stop_requests.current())
            self._advance(result, report)
            outcome = self._ending(result)
            is_last = self.progress.iteration >= train.train_iters
            is_evaluated = windows is not None and (
                is_last
                or (train.eval_interval and self.progress.iteration % train.eval_interval == 0)
            )
            if is_evaluated or outcome or self.progress.iteration % train.log_interval == 0:
                record = self._record(result)
                validation = evaluate(self.model, windows) if is_evaluated else {}
                report.log({**record, **validation})
                self._restart_window()
            if self._should_save(outcome):
                saving = time.perf_counter()
                folder = save_checkpoint(self.run, self.state, self.progress)
                report.saved(folder)
                self._started += time.perf_counter() - saving  # a save is not part of a step
        return outcome

    def _initialize_codebooks(self) -> None:
        """One forward pass over the first microbatch; each layer sets its codebook when reached.

        Dropout is off and data is read by an iterator of its own, so training starts untouched.
        """
        pipeline_size = self.run.layout.pipeline_model_parallel_size
        for chunk in self.model:
            chunk.eval()
        with torch.no_grad():
            run_microbatches(
                self.model,
                training_iterators(self.config, self.run.corpus, 0, len(self.model)),
                min(pipeline_size, self.num_microbatches),
                self.config.model.seq_length,
                self.config.train.micro_batch_size,
                forward_only=True,
            )
        for chunk in self.model:
            chunk.train()

    def _advance(self, result: StepResult, report: RunReport) -> None:
        batch = self.config.train.global_batch_size
        before = self.progress
        self.progress = Progress(
            iteration=before.iteration + 1,
            consumed_samples=before.consumed_samples + batch,
            skipped_iterations=before.skipped_iterations + result.skipped,
            mlflow_run_id=report.mlflow_run_id,
        )
        self.window.add(self.codebook_sync.layers)
        self._core_seconds += result.core_seconds
        self._steps_in_window += 1
        if result.skipped:
            samples = f"samples {before.consumed_samples}..{self.progress.consumed_samples - 1}"
            text = f"iteration {self.progress.iteration}: non-finite loss or gradient on {samples}"
            if self.config.train.nan_policy == "stop":
                raise FloatingPointError(f"{text}; train.nan_policy=stop")
            report.message(f"{text}; update skipped (train.nan_policy=skip)")

    def _ending(self, result: StepResult) -> Outcome | None:
        train, iteration = self.config.train, self.progress.iteration
        if iteration >= train.train_iters:
            return Outcome("completed", iteration, "all iterations done")
        if result.stop_request != NO_REQUEST:
            return Outcome("requeue", iteration, REASONS[result.stop_request])
        if train.exit_interval and iteration % train.exit_interval == 0:
            reason = f"train.exit_interval reached at {iteration} of {train.train_iters}"
            return Outcome("completed", iteration, reason)
        return None

    def _should_save(self, outcome: Outcome | None) -> bool:
        interval = self.config.checkpoint.save_interval
        return outcome is not None or bool(interval and self.progress.iteration % interval == 0)

    def _record(self, result: StepResult) -> dict[str, float]:
        """The log record; all ranks take part in the gathers."""
        elapsed = time.perf_counter() - self._started
        data_seconds = sum(iterator.take_seconds() for iterator in self.iterators)
        steps, samples = self._steps_in_window, self.progress.consumed_samples
        tokens_per_step = self.config.train.global_batch_size * self.config.model.seq_length
        layers = gather_layers(self.window)
        if torch.distributed.get_rank() == 0:
            write_routing(self.run.run_dir.routing, layers)
        return {
            "iteration": self.progress.iteration,
            "consumed_tokens": samples * self.config.model.seq_length,
            "consumed_samples": samples,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "tokens_per_second": steps * tokens_per_step / elapsed,
            "step_time_ms": elapsed / steps * 1000,
            "overhead_share": (elapsed - self._core_seconds + data_seconds) / elapsed,
            "skipped_iterations": self.progress.skipped_iterations,
            "memory/peak_rss_bytes": peak_rss_bytes(),
            **balance_loss(self.config, steps, self.num_microbatches),
            **layer_metrics(layers),
        }

    def _restart_window(self) -> None:
        if not torch.cuda.is_available():
            release_free_memory()
        self.window = LayerWindow()
        self._started = time.perf_counter()
        self._core_seconds, self._steps_in_window = 0.0, 0
        for iterator in self.iterators:
            iterator.take_seconds()
