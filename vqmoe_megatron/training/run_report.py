"""What rank 0 shows and keeps of a run: console, metrics.jsonl, MLflow, status.json, plots.

Other ranks hold a report that does nothing, so the loop needs no rank tests.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vqmoe_megatron.analysis.plots import draw_run_plots
from vqmoe_megatron.recipe import flatten_config, save_recipe
from vqmoe_megatron.tracking.console import RunConsole
from vqmoe_megatron.tracking.metrics_log import MetricsLog
from vqmoe_megatron.tracking.mlflow_tracker import OUTCOME_OF_STATE, MlflowTracker, NoTracker
from vqmoe_megatron.tracking.run_status import write_status
from vqmoe_megatron.training.preflight import CheckedRun

# Which launcher facts become tags of the attempt.
ATTEMPT_VARIABLES = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")


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
        resumed_run_id: MLflow run of the checkpoint, or None.
    """

    def __init__(self, run: CheckedRun, start_iteration: int, resumed_run_id: str | None) -> None:
        self.run_dir = run.run_dir
        self._iteration = start_iteration
        save_recipe(run.config, self.run_dir.config)
        bytes_per_token = run.corpus.split("train").bytes_per_token
        self.console = RunConsole(run.config.train.train_iters, start_iteration, bytes_per_token)
        self.console.__enter__()
        self.metrics_log = MetricsLog(self.run_dir.path)
        if start_iteration:
            self.metrics_log.truncate_after(start_iteration)
        else:
            self.metrics_log.truncate_after(-1)
        tracking = run.config.tracking
        self.tracker: MlflowTracker | NoTracker = NoTracker()
        if tracking.mlflow:
            self.tracker = MlflowTracker(
                tracking.mlflow_uri,
                tracking.experiment,
                tracking.run_name,
                self.run_dir.path,
                resumed_run_id,
                parent_run_id=tracking.parent_run_id,
                report=self.message,
            )
            self.message(f"mlflow: {self.tracker.uri} run {self.tracker.run_id}")
        self.tracker.log_params(flatten_config(run.config))
        self.tracker.log_artifact(self.run_dir.config)
        self.tracker.set_tags(
            {name: os.environ[name] for name in ATTEMPT_VARIABLES if name in os.environ}
        )
        self.mlflow_run_id = self.tracker.run_id
        self._write_status("running", "training")

    def message(self, text: str) -> None:
        """Print a line above the progress display."""
        self.console.message(text)

    def saved(self, folder: Path) -> None:
        """Say that a checkpoint is complete and tag the MLflow run with it."""
        self.message(f"saved {folder}")
        iteration = int(folder.name.removeprefix("iter_"))
        self.tracker.set_tags({"checkpoint": str(folder), "iteration": iteration})
        self._write_status("running", "training")

    def rolled_back(self, iteration: int, text: str) -> None:
        """Cut metrics.jsonl back. MLflow keeps both values of a step; a tag says which steps."""
        self.message(text)
        self.metrics_log.truncate_after(iteration)
        self.tracker.set_tags({f"rollback/{self._iteration}": text})
        self._iteration = iteration
        self._write_status("running", text)

    def log(self, record: Mapping[str, float]) -> None:
        """Append to metrics.jsonl, show on the console, queue for MLflow."""
        self._iteration = int(record["iteration"])
        self.metrics_log.append(record)
        self.console.update(record)
        values = {name: value for name, value in record.items() if name != "iteration"}
        self.tracker.log_metrics(values, self._iteration)

    def finish(self, state: str, iteration: int, reason: str) -> None:
        """Draw plots, close tracking truthfully, write the final status last."""
        self.console.close()
        self.metrics_log.close()
        if state != "failed":
            for plot in draw_run_plots(self.run_dir.path):
                self.tracker.log_artifact(plot, "plots")
        self.tracker.finish(OUTCOME_OF_STATE[state])
        self._iteration = iteration
        self._write_status(state, reason)
        self.message(
            f"{state} at iteration {iteration}: {reason}; run directory {self.run_dir.path}"
        )

    def _write_status(self, state: str, reason: str) -> None:
        try:
            write_status(self.run_dir.path, state, self._iteration, reason, self.tracker.run_id)
        except OSError as error:
            if state != "running":  # the last word must be written
                raise
            self.message(f"status.json could not be written: {error}; training goes on")
