"""One rank's training run: build, resume, step, report.

1. Build model, optimizer, schedule and data for the layout.
2. Load the newest checkpoint, or initialise the codebooks from the first microbatch.
3. Evaluate, then step until the end or a stop request; log, evaluate, check and save on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from vqmoe_megatron import registry
from vqmoe_megatron.checkpoint.checksums import check_data_together
from vqmoe_megatron.checkpoint.content import readable
from vqmoe_megatron.checkpoint.folder import find_checkpoint, has_same_layout
from vqmoe_megatron.checkpoint.random_state import seed_generators
from vqmoe_megatron.checkpoint.remap import load_remapped, load_weights
from vqmoe_megatron.checkpoint.saver import CheckpointSaver, SavedRun, SaveFailed
from vqmoe_megatron.checkpoint.state import Progress, TrainingState, load_checkpoint
from vqmoe_megatron.data.evaluation_windows import EvaluationWindows
from vqmoe_megatron.engines.engine import Engine, StepResult
from vqmoe_megatron.runtime.determinism import require_determinism
from vqmoe_megatron.tasks.task import Task
from vqmoe_megatron.train.bad_batches import (
    BadBatch,
    after_the_bad_batch,
    check_rollback,
    record_bad_batch,
)
from vqmoe_megatron.train.evaluate import evaluate
from vqmoe_megatron.train.log_window import LogWindow
from vqmoe_megatron.train.preflight import CheckedRun
from vqmoe_megatron.train.replica_check import check_replicas
from vqmoe_megatron.train.run_report import RunReport
from vqmoe_megatron.train.stop_requests import NO_REQUEST, REASONS, StopRequests
from vqmoe_megatron.train.timed_iterator import TimedIterator

HEAD = ("output_layer.",)  # tensors of a classification head, which pretraining does not know


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
        if train.deterministic:
            require_determinism()
        seed_generators(train.seed)
        self.task: Task = registry.load("task", train.task)(self.config, run.corpus)
        engine = registry.load("engine", train.engine)
        self.engine: Engine = engine.build(self.config, run.layout, self.task)
        self.model = self.engine.model
        self.state = TrainingState(self.model, self.engine.optimizer, self.engine.scheduler)
        self.saver = CheckpointSaver(
            SavedRun(self.config, run.layout, run.corpus.content, run.run_dir), self.state
        )
        self.progress = Progress(iteration=0, consumed_samples=0, skipped_iterations=0)
        self.num_rollbacks: dict[int, int] = {}  # by the iteration gone back to
        self.window = LogWindow(run)

    @property
    def num_parameters(self) -> int:
        """Parameters on this rank."""
        return sum(p.numel() for chunk in self.model for p in chunk.parameters())

    def resume(self) -> list[str]:
        """Load the checkpoint that the preflight chose, if any, and say what was done.

        Communicates over the world.
        """
        if self.run.resume_from is not None:
            return [self._load(self.run.resume_from)]
        done: list[str] = []
        if self.run.remap_from is not None:
            check_data_together(self.run.remap_from)
            with readable(self.run.remap_from):
                if self.config.finetune.is_on:
                    load_weights(self.run.remap_from, self.model, self.config, HEAD)
                    done.append(
                        f"fine-tuning ({self.config.finetune.mode}) of {self.run.remap_from}"
                    )
                else:
                    load_remapped(self.run.remap_from, self.model, self.config, done.append)
            self.engine.optimizer.reload_model_params()
        return done

    def _load(self, folder: Path) -> str:
        is_same = has_same_layout(folder, self.run.layout)
        has_checksums = check_data_together(folder)
        with readable(folder):
            self.progress = load_checkpoint(folder, self.state, is_same)
        done = f"resumed from {folder}"
        if not has_checksums:
            done += ", which has no checksums: damage in its data would not be noticed"
        if is_same:
            return done
        seed_generators(self.config.train.seed, self.progress.iteration)
        return f"{done}, written at another layout: random states start anew"

    def train(self, report: RunReport) -> Outcome:
        """Run to the end or to a stop request. Communicates over every group of the layout."""
        train = self.config.train
        if self.progress.iteration >= train.train_iters:  # before data is opened and workers start
            return Outcome("completed", self.progress.iteration, "all iterations done")
        for chunk in self.model:
            chunk.train()
        for note in self.engine.notes:
            report.message(note)
        if self.progress.iteration == 0:
            self._initialize_codebooks()
        self._read_from_here()
        windows = self.task.evaluation_batches() if train.eval_iters else None
        if windows is not None:
            report.message(f"validation: {windows.description}")
            if self.progress.iteration == 0:
                start = {"iteration": 0, "consumed_tokens": 0, "consumed_samples": 0}
                report.log({**start, **self._evaluate(windows)})
        self.window.restart(self.iterators)

        outcome = None
        while outcome is None:
            result = self.engine.step(
                self.iterators, self.stop_requests.current(), self.stop_requests.wants_save()
            )
            if not self._advance(result, report):
                continue
            if self._is_due(train.check_replicas_interval):
                with self.window.pause():
                    check_replicas(self.model, self.progress.iteration)
            outcome = self._ending(result)
            is_last = self.progress.iteration >= train.train_iters
            is_evaluated = windows is not None and (is_last or self._is_due(train.eval_interval))
            if outcome is not None and outcome.state == "requeue":
                report.message(f"stopping at iteration {outcome.iteration}: {outcome.reason}")
                is_evaluated = False  # the time left is for the checkpoint
            if is_evaluated or outcome or self._is_due(train.log_interval):
                record = self.window.record(self.progress, result, self.iterators)
                validation = self._evaluate(windows) if is_evaluated else {}
                report.log({**record, **validation})
                self.window.restart(self.iterators)
            with self.window.pause():
                self._save_when_due(result, outcome, report)
        return outcome

    def _evaluate(self, windows: EvaluationWindows) -> dict[str, float]:
        pipeline_size = self.run.layout.pipeline_model_parallel_size
        return evaluate(self.engine, self.task, windows, pipeline_size)

    def _initialize_codebooks(self) -> None:
        """One forward pass over the first microbatch; each layer sets its codebook when reached.

        Dropout is off and data is read by an iterator of its own, so training starts untouched.
        """
        pipeline_size = self.run.layout.pipeline_model_parallel_size
        for chunk in self.model:
            chunk.eval()
        with torch.no_grad():
            self.engine.forward(
                self.task.training_iterators(len(self.model), 0, 0),
                min(pipeline_size, self.engine.num_microbatches),
                self.config.model.seq_length,
                self.config.train.micro_batch_size,
            )
        for chunk in self.model:
            chunk.train()

    def _read_from_here(self) -> None:
        """(Re)open the training data behind the samples consumed so far."""
        self.iterators = [
            TimedIterator(iterator)
            for iterator in self.task.training_iterators(
                len(self.model), self.progress.consumed_samples, self.progress.passed_over_samples
            )
        ]

    def _advance(self, result: StepResult, report: RunReport) -> bool:
        """Count the step; follow ``train.nan_policy`` when it was bad. False after a rollback."""
        batch = self.config.train.global_batch_size
        before = self.progress
        self.progress = replace(
            before,
            iteration=before.iteration + 1,
            consumed_samples=before.consumed_samples + batch,
            skipped_iterations=before.skipped_iterations + result.skipped,
            mlflow_run_id=report.mlflow_run_id,
        )
        self.window.add(result, self.engine.layers)
        if not result.skipped:
            return True
        policy = self.config.train.nan_policy
        bad = BadBatch.of(before, batch, result.loss, policy)
        if torch.distributed.get_rank() == 0:
            record_bad_batch(self.run.run_dir.bad_batches, bad)
        if policy == "skip":
            report.message(f"{bad.text}; update skipped (train.nan_policy=skip)")
            return True
        self._publish(report, wait=True)
        if policy == "stop":
            raise FloatingPointError(f"{bad.text}; train.nan_policy=stop")
        self._roll_back(bad, report)
        return False

    def _roll_back(self, bad: BadBatch, report: RunReport) -> None:
        """Go back to the newest checkpoint and on with the data behind the bad batch."""
        newest: list[Path | None] = [None]
        if torch.distributed.get_rank() == 0:  # elsewhere a file system may lag behind
            newest = [find_checkpoint(self.run.run_dir.path) or self.run.resume_from]
        torch.distributed.broadcast_object_list(newest, src=0)
        (folder,) = newest
        check_rollback(bad, folder, self.num_rollbacks)
        self._load(folder)
        self.progress = after_the_bad_batch(self.progress, bad, report.mlflow_run_id)
        self._read_from_here()
        report.rolled_back(self.progress.iteration, f"{bad.text}; went back to {folder}")
        self.window.restart(self.iterators)

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

    def _is_due(self, interval: int) -> bool:
        return bool(interval) and self.progress.iteration % interval == 0

    def _save_when_due(
        self, result: StepResult, outcome: Outcome | None, report: RunReport
    ) -> None:
        """Save at the end, on request and at the interval; publish what was written meanwhile.

        A save that fails on the way is reported and training goes on; the last one must not fail.
        """
        is_due = result.save_requested or self._is_due(self.config.checkpoint.save_interval)
        self._publish(report, wait=is_due or outcome is not None)
        if is_due or outcome is not None:
            # Who asks for a save waits for it.
            is_asked_for = result.save_requested or outcome is not None
            in_background = self.config.checkpoint.async_save and not is_asked_for
            try:
                folder = self.saver.save(self.progress, in_background)
            except SaveFailed as error:
                if outcome is not None:
                    raise
                report.message(f"{error}; training goes on")
            else:
                if folder is not None:
                    report.saved(folder)
        self.stop_requests.save_was_seen(result.save_requested)

    def _publish(self, report: RunReport, wait: bool) -> None:
        """Give the background save its name when it is written, or say why it is not."""
        try:
            folder = self.saver.poll(wait)
        except SaveFailed as error:
            report.message(f"{error}; training goes on")
        else:
            if folder is not None:
                report.saved(folder)
