"""A run whose environment has no MLflow: its record is kept for ``vqmoe mlflow-sync``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vqmoe_megatron.track.mlflow.record import MlflowRecord
from vqmoe_megatron.track.mlflow.run_params import MAX_TAG_CHARACTERS, shortened
from vqmoe_megatron.track.tracker import TrackedRun, Tracker


class UntrackedRun(Tracker):
    """Notes tags and the end of the run in ``mlflow.json``, as the MLflow tracker does.

    A sync from an environment with MLflow then sends the run whole.
    """

    def __init__(self, run: TrackedRun, record: MlflowRecord) -> None:
        super().__init__(run)
        self._record = record

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Keep them."""
        self._record.note_tags(shortened(tags, MAX_TAG_CHARACTERS, self.run.report))

    def checkpoint_saved(self, folder: Path, iteration: int) -> None:
        """Keep what the run would be tagged with."""
        self.set_tags({"checkpoint": str(folder), "iteration": iteration})

    def finish(self, state: str, deadline_s: float) -> None:
        """Keep that the run reached its end."""
        if state == "completed":
            self._record.note_completed()
