"""All trackers of a run as one: each is told, and what one raises reaches nobody else."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vqmoe_megatron import registry
from vqmoe_megatron.track.tracker import TrackedRun, Tracker

LEAST_DEADLINE_S = 1.0  # for a tracker behind one that used up the time of all


class Trackers(Tracker):
    """Opens the trackers ``names`` of the registry, and passes on every call.

    A tracker's first error is reported, its further ones are not; it is told all the same, since
    the next call may go well. One that cannot be opened is left out.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        super().__init__(run)
        self._open: dict[str, Tracker] = {}
        self._reported: set[str] = set()
        for name in names:
            with self._isolated(name, "opening"):
                self._open[name] = registry.load("tracker", name).open(run)

    @property
    def run_id(self) -> str | None:
        """MLflow's, which checkpoints and ``status.json`` keep."""
        return self._open["mlflow"].run_id if "mlflow" in self._open else None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Tell all."""
        self._tell("log_params", params)

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Tell all."""
        self._tell("set_tags", tags)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Tell all."""
        self._tell("log_artifact", path, folder)

    def metrics_logged(self, record: Mapping[str, int | float]) -> None:
        """Tell all."""
        self._tell("metrics_logged", record)

    def rolled_back(self, iteration: int) -> None:
        """Tell all."""
        self._tell("rolled_back", iteration)

    def checkpoint_saved(self, folder: Path, iteration: int) -> None:
        """Tell all."""
        self._tell("checkpoint_saved", folder, iteration)

    def finish(self, state: str, deadline_s: float) -> None:
        """Tell all, one after the other; ``deadline_s`` is for all together."""
        until = time.monotonic() + deadline_s
        for name, tracker in self._open.items():
            with self._isolated(name, "finish"):
                tracker.finish(state, max(LEAST_DEADLINE_S, until - time.monotonic()))

    def _tell(self, call: str, *args: object) -> None:
        for name, tracker in self._open.items():
            with self._isolated(name, call):
                getattr(tracker, call)(*args)

    @contextlib.contextmanager
    def _isolated(self, name: str, call: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # tracking must never end training
            if name not in self._reported:
                self._reported.add(name)
                self.run.report(
                    f"tracker {name}: {call} failed: {type(error).__name__}: {error}; training "
                    "goes on, further errors of this tracker are not shown"
                )
