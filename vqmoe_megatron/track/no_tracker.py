"""Tracking switched off: the calls of a tracker, doing nothing, so that nobody has to ask."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vqmoe_megatron.track.mlflow.store import Outcome


class NoTracker:
    """MlflowTracker's calls, doing nothing."""

    run_id: str | None = None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Do nothing."""

    def metrics_logged(self) -> None:
        """Do nothing."""

    def rolled_back(self, iteration: int) -> None:
        """Do nothing."""

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Do nothing."""

    def finish(self, status: Outcome, deadline_s: float = 20.0) -> None:
        """Do nothing."""
