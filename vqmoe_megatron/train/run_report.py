"""What rank 0 shows and keeps of a run: console, metrics.jsonl, trackers, status.json, plots.

Other ranks hold a report that does nothing, so the loop needs no rank tests.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from vqmoe_megatron.checkpoint.folder import iteration_of
from vqmoe_megatron.config.recipe import flatten_config, save_recipe
from vqmoe_megatron.rundir.file_names import SYSTEM_METRICS_FILE
from vqmoe_megatron.rundir.status import read_status, write_status
from vqmoe_megatron.runtime.optional_packages import missing
from vqmoe_megatron.track.console import RunConsole
from vqmoe_megatron.track.metrics_log import MetricsLog
from vqmoe_megatron.track.system_metrics import SystemMetrics
from vqmoe_megatron.track.tracker import TrackedRun
from vqmoe_megatron.track.trackers import Trackers
from vqmoe_megatron.train.preflight import CheckedRun
from vqmoe_megatron.train.records import is_same_run

# How long the end waits for trackers. Runs that meet an MLflow database none of them has made yet
# need half a minute on a busy node. One that was told to stop has little time; the next attempt
# sends the rest.
TRACKING_DEADLINES_S = {"completed": 60.0, "requeue": 20.0, "failed": 20.0}


class RunReport:
    """The surface of a run. ``mlflow_run_id`` is what the checkpoint remembers."""

    mlflow_run_id: str | None = None

    def message(self, text: str) -> None:
        """Tell the reader something."""

    def saved(self, folder: Path) -> None:
        """Say that a checkpoint is complete."""

    def rolled_back(self, iteration: int, text: str) -> None:
        """Forget the iterations after ``iteration``: training does them again."""

    def log(self, record: Mapping[str, float]) -> None:
        """Keep and show one iteration's metrics."""

    def finish(self, state: str, iteration: int, reason: str) -> None:
        """Set the final status and draw the plots."""


class SilentReport(RunReport):
    """Every rank but 0."""


class Rank0Report(RunReport):
    """The report of rank 0.

    Args:
        run: the checked run.
        start_iteration: where training (re)starts; later metrics are cut away.
        mlflow_run_id: MLflow run of the checkpoint it starts from, or None.
    """

    def __init__(self, run: CheckedRun, start_iteration: int, mlflow_run_id: str | None) -> None:
        self.run_dir = run.run_dir
        self._iteration = start_iteration
        is_same = is_same_run(run.run_dir, run.config)  # before the recipe is written
        save_recipe(run.config, self.run_dir.config)
        bytes_per_token = None  # of images, and of texts with one answer each
        if not (run.config.vision.is_on or run.config.finetune.is_on):
            bytes_per_token = run.corpus.split("train").bytes_per_token
        self.console = RunConsole(run.config.train.train_iters, start_iteration, bytes_per_token)
        self.console.__enter__()
        self.metrics_log = MetricsLog(self.run_dir.path)
        self.system_log = MetricsLog(self.run_dir.path, SYSTEM_METRICS_FILE)
        for log in (self.metrics_log, self.system_log):
            log.truncate_after(start_iteration or -1)
        last = self.metrics_log.last_iteration
        if run.is_own and last + run.config.train.log_interval <= start_iteration:
            self.message(
                f"{self.metrics_log.path} goes on behind a gap: it holds nothing of iterations "
                f"{last + 1} to {start_iteration}"
            )
        tracking = run.config.tracking
        self.system_metrics = SystemMetrics(self.message) if tracking.system_metrics else None
        tracked = TrackedRun(
            self.run_dir.path,
            run.config,
            run.layout.world_size,
            start_iteration,
            is_resumed=run.resume_from is not None and run.is_own,
            is_same=is_same,
            mlflow_run_id=mlflow_run_id,
            report=self.message,
        )
        self.trackers = Trackers(tracking.trackers, tracked)
        self.trackers.log_params(flatten_config(run.config))
        self.trackers.log_artifact(self.run_dir.config)
        self.mlflow_run_id = self.trackers.run_id
        if start_iteration < run.config.train.train_iters:  # else a completed run stays one
            self._write_status("running", "training")

    def message(self, text: str) -> None:
        """Print a line above the progress display."""
        self.console.message(text)

    def saved(self, folder: Path) -> None:
        """Say that a checkpoint is complete."""
        self.message(f"saved {folder}")
        self.trackers.checkpoint_saved(folder, iteration_of(folder))
        self._write_status("running", "training")

    def rolled_back(self, iteration: int, text: str) -> None:
        """Cut metrics.jsonl back. MLflow keeps both values of a step; a tag says which steps."""
        self.message(text)
        self.metrics_log.truncate_after(iteration)
        self.system_log.truncate_after(iteration)
        self.trackers.rolled_back(iteration)
        self.trackers.set_tags({f"rollback/{self._iteration}": text})
        self._iteration = iteration
        self._write_status("running", text)

    def log(self, record: Mapping[str, float]) -> None:
        """Append to metrics.jsonl, show on the console, tell the trackers."""
        self._iteration = int(record["iteration"])
        when = {"iteration": self._iteration, "timestamp_ms": time.time_ns() // 1_000_000}
        records = [{**record, **when}]
        self.metrics_log.append(records[0])
        load = self.system_metrics.take() if self.system_metrics is not None else {}
        if load:
            records.append({**when, **load})
            self.system_log.append(records[1])
        self.console.update(record)
        for each in records:
            self.trackers.metrics_logged(each)

    def _draw_plots(self) -> None:
        """A picture must not cost a saved run its state: the launcher decides on that."""
        problem = missing("matplotlib")
        if problem is not None:
            self.message(f"no plots: {problem}")
            return
        try:
            from vqmoe_megatron.analysis.plots import draw_run_plots

            for plot in draw_run_plots(self.run_dir.path):
                self.trackers.log_artifact(plot, "plots")
        except Exception as error:
            self.message(f"plots could not be drawn: {type(error).__name__}: {error}")

    def finish(self, state: str, iteration: int, reason: str) -> None:
        """Draw plots, close tracking truthfully, write the final status last.

        A run that was told to stop writes its status first, too: it may be killed any moment.
        """
        self._iteration = iteration
        if state == "requeue":
            self._write_status(state, reason)
        self.console.close()
        if self.system_metrics is not None:
            self.system_metrics.close()
        self.metrics_log.close()
        self.system_log.close()
        if state != "failed":
            self._draw_plots()
        self.trackers.finish(state, TRACKING_DEADLINES_S[state])
        if state == "failed" and (known := read_status(self.run_dir.path)) is not None:
            reason = known.reason  # another rank may have recorded the cause meanwhile
        self._write_status(state, reason, is_last_word=True)
        self.message(
            f"{state} at iteration {iteration}: {reason}; run directory {self.run_dir.path}"
        )

    def _write_status(self, state: str, reason: str, is_last_word: bool = False) -> None:
        try:
            write_status(self.run_dir.path, state, self._iteration, reason, self.trackers.run_id)
        except OSError as error:
            if is_last_word:
                raise
            self.message(f"status.json could not be written: {error}; training goes on")
