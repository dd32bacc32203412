"""What a run tells whoever records it elsewhere: the interface of trackers, MLflow's and others.

A tracker is a file with a :class:`Tracker` and a line of the registry (or an entry point
``tracker.NAME`` of a package); ``tracking.also`` then takes its name. The run's own records
(``metrics.jsonl``, ``status.json``, checkpoints) are not its business: they are there without it.

Only rank 0 has trackers. Every call comes from the thread that trains, so it must return at once:
what may wait, for a network or a disk, belongs into a thread of the tracker's own. Only ``open``
and ``finish`` may take their time. What a call raises is reported and never ends a run; what went
wrong in a thread is for ``run.report``, once and not at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.config import RunConfig


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of the attempt that it is opened for."""

    run_dir: Path  # with metrics.jsonl and system_metrics.jsonl, whose records are whole lines
    config: RunConfig
    world_size: int  # ranks
    start_iteration: int  # records of later ones follow; those up to it are in the log
    is_resumed: bool  # it goes on from this directory's own checkpoint
    is_same: bool  # the directory's last attempt, if any, was of the same run
    mlflow_run_id: str | None  # of the checkpoint that it starts from, wherever that lies
    report: Callable[[str], None]  # takes a line for the console, from any thread


class Tracker:
    """Told of one attempt of a run, in this order; what it has no use for does nothing here."""

    run_id: str | None = None  # the store's name of the run; MLflow's is kept in checkpoints

    def __init__(self, run: TrackedRun) -> None:
        self.run = run

    @classmethod
    def open(cls, run: TrackedRun) -> Tracker:
        """Begin an attempt, in the run of an earlier one or a new one. May take half a minute."""
        return cls(run)

    def log_params(self, params: Mapping[str, object]) -> None:
        """The resolved recipe, by dotted key; a resumed run may have changed some."""

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Facts about the run; a later value replaces an earlier one."""

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """A file of the run directory, for ``folder`` of the run's files; it stays where it is."""

    def metrics_logged(self, record: Mapping[str, int | float]) -> None:
        """A record was appended to one of the logs, and holds ``iteration`` and ``timestamp_ms``.

        Names and units are those of the metric table. Values may be NaN or infinite.
        """

    def rolled_back(self, iteration: int) -> None:
        """The logs were cut after ``iteration``: later ones are trained again and logged again."""

    def checkpoint_saved(self, folder: Path, iteration: int) -> None:
        """A checkpoint is complete."""

    def finish(self, state: str, deadline_s: float) -> None:
        """The attempt is over: ``completed``, ``requeue`` (to be resumed) or ``failed``.

        May send what is left, for at most ``deadline_s`` seconds. Nothing is called afterwards.
        """
