"""Shipping a run to MLflow from one background thread, never at the cost of a training step.

1. The training thread puts small work items on a bounded queue and returns at once; when the queue
   is full the item is dropped and counted (``metrics.jsonl`` holds every metric anyway).
2. The thread opens the run, then sends the items in order. A store that is down is tried again with
   growing pauses, so an outage delays metrics but leaves no hole; metric timestamps are taken when
   logged, so sending one twice stores it once. What the store refuses for good is reported.
3. ``finish`` drains the queue, sets the run's status, and gives up at its deadline with an account
   of what was not sent.

No method raises into training or communicates with other ranks; only rank 0 builds a tracker.
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vqmoe_megatron.tracking.metric_table import is_mlflow_name
from vqmoe_megatron.tracking.mlflow_errors import explained, is_permanent
from vqmoe_megatron.tracking.mlflow_store import Outcome, RunHandle, default_mlflow_uri, open_run
from vqmoe_megatron.tracking.run_params import MAX_PARAM_CHARACTERS, MAX_TAG_CHARACTERS, shortened

# What a run's state in status.json is called in MLflow: a preempted run was killed, and may resume.
OUTCOME_OF_STATE: dict[str, Outcome] = {
    "completed": "FINISHED",
    "failed": "FAILED",
    "requeue": "KILLED",
}

MAX_ITEMS_PER_REQUEST = 100  # MLflow's limit for params and tags in one batch
MAX_METRICS_PER_REQUEST = 1000  # MLflow's limit for one batch
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
ATTEMPTS_WHILE_FINISHING = 3
ARTIFACT_ATTEMPTS = 3  # a broken artifact store must not hold up the metrics behind the file
IDLE_POLL_S = 0.2


class NoTracker:
    """Tracking switched off, or a rank other than 0: MlflowTracker's calls, doing nothing."""

    run_id: str | None = None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Do nothing."""

    def finish(self, status: Outcome, deadline_s: float = 20.0) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class _Item:
    """One call of the training thread, waiting to be sent."""

    kind: Literal["params", "metrics", "tags", "artifact"]
    values: dict[str, object]
    step: int = 0
    timestamp_ms: int = 0


class MlflowTracker:
    """Ships params, metrics, tags and files of one run; see the file's head for the guarantees.

    ``uri=None`` means :func:`default_mlflow_uri`. The constructor waits up to ``start_deadline_s``
    for the run to exist, so that ``run_id`` is known; past it training goes on and the thread keeps
    trying. ``report`` receives notices (the console's ``message``, or ``print``).
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        run_name: str | None,
        run_dir: str | Path,
        resume_run_id: str | None = None,
        *,
        parent_run_id: str | None = None,
        start_deadline_s: float = 30.0,
        max_pending: int = 10_000,
        report: Callable[[str], None] = print,
    ) -> None:
        self.run_dir = Path(run_dir).resolve()
        self.uri = uri or default_mlflow_uri(run_dir)
        self._open = lambda: open_run(
            self.uri,
            experiment,
            run_name or self.run_dir.name,
            {"run_dir": str(self.run_dir)}
            | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {}),
            resume_run_id,
        )
        self._report = lambda text: report(f"mlflow: {text}")
        self._queue: queue.Queue[_Item] = queue.Queue(max_pending)
        self._handle: RunHandle | None = None
        self._start_settled = threading.Event()  # the run exists, or the first attempt failed
        self._finishing = threading.Event()
        self._outcome: Outcome = "FINISHED"
        self._num_logged = 0
        self._lost: Counter[str] = Counter()  # reason -> number of items
        self._thread = threading.Thread(target=self._work, name="mlflow-shipping", daemon=True)
        self._thread.start()
        if not self._start_settled.wait(start_deadline_s):
            self._report(
                f"no run at {self.uri} after {start_deadline_s:g} s; training goes on, still trying"
            )

    @property
    def run_id(self) -> str | None:
        """The MLflow run id, ``None`` while the run could not be opened."""
        return self._handle.run_id if self._handle else None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record parameters; on a resumed run a changed value becomes the tag ``resume/<key>``."""
        self._put(_Item("params", shortened(params, MAX_PARAM_CHARACTERS, self._report)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers at iteration ``step``; steps a resumed run already holds are skipped."""
        self._put(_Item("metrics", dict(metrics), step, time.time_ns() // 1_000_000))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload one file into ``folder`` of the run's artifacts; it must stay until it is sent."""
        self._put(_Item("artifact", {"path": str(path), "folder": folder}))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags, replacing earlier values."""
        self._put(_Item("tags", shortened(tags, MAX_TAG_CHARACTERS, self._report)))

    def finish(self, status: Outcome, deadline_s: float = 20.0) -> None:
        """Send what is queued, set the run's status, return by the deadline whatever happens."""
        if self._finishing.is_set():
            return
        self._outcome = status
        self._finishing.set()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._report(
                f"gave up after {deadline_s:g} s; {self.uri} may still show the run as RUNNING"
            )
        if self._queue.unfinished_tasks:
            self._lost["not sent"] += self._queue.unfinished_tasks
        if self._lost:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self._lost.items())
            self._report(
                f"{sum(self._lost.values())} of {self._num_logged} items did not reach {self.uri} "
                f"({reasons}); {self.run_dir / 'metrics.jsonl'} holds every metric"
            )

    def _put(self, item: _Item) -> None:
        self._num_logged += 1
        if self._finishing.is_set():
            self._lost["logged after finish"] += 1
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._lost["queue full"] += 1

    # Everything below runs on the background thread only.

    def _work(self) -> None:
        if self._retry("cannot open a run", self._open_run) != "done":
            return
        while not (self._finishing.is_set() and self._queue.empty()):
            try:
                item = self._queue.get(timeout=IDLE_POLL_S)
            except queue.Empty:
                continue
            max_attempts = ARTIFACT_ATTEMPTS if item.kind == "artifact" else None
            send = functools.partial(self._send, item)
            result = self._retry(f"cannot send {item.kind}", send, max_attempts)
            if result == "unreachable" and self._finishing.is_set():
                return  # the store is down and the run is over: leave the rest unsent
            if result != "done":
                self._lost[f"{item.kind} {result}"] += 1
            self._queue.task_done()
        self._retry("cannot set the run's status", self._terminate)

    def _retry(
        self, what: str, action: Callable[[], None], max_attempts: int | None = None
    ) -> Literal["done", "refused", "unreachable"]:
        """Run ``action`` until it succeeds, is refused for good, or its attempts are used up.

        ``max_attempts=None`` tries for as long as training runs; once it is finishing, the attempts
        still allowed are :data:`ATTEMPTS_WHILE_FINISHING`.
        """
        pause_s, num_failed, num_failed_finishing = FIRST_PAUSE_S, 0, 0
        while True:
            try:
                action()
            except Exception as error:  # tracking must never end training: reported and counted
                num_failed += 1
                num_failed_finishing += self._finishing.is_set()
                permanent = is_permanent(error)
                finishing_over = num_failed_finishing == ATTEMPTS_WHILE_FINISHING
                if permanent or num_failed == 1:
                    then = "not tried again" if permanent else "trying again in the background"
                    self._report(f"{what} at {self.uri}: {explained(error, self.uri)}; {then}")
                self._start_settled.set()
                if permanent or finishing_over or num_failed == max_attempts:
                    return "refused" if permanent else "unreachable"
                self._pause(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            else:
                if num_failed:
                    self._report(f"{self.uri} answers again")
                return "done"

    def _pause(self, pause_s: float) -> None:
        """Wait, ended early by the start of finishing, and only briefly once it has begun."""
        if self._finishing.is_set():
            time.sleep(FIRST_PAUSE_S)
        else:
            self._finishing.wait(pause_s)

    def _open_run(self) -> None:
        handle = self._open()
        self._handle = handle
        if handle.notice:
            self._report(handle.notice)
        self._start_settled.set()

    def _send(self, item: _Item) -> None:
        if item.kind == "metrics":
            self._send_metrics(item)
        elif item.kind == "params":
            self._send_params(item.values)
        elif item.kind == "tags":
            self._send_tags(item.values)
        else:
            self._handle.client.log_artifact(
                self._handle.run_id, item.values["path"], item.values["folder"]
            )

    def _send_metrics(self, item: _Item) -> None:
        from mlflow.entities import Metric

        last = self._handle.last_steps
        metrics = []
        for name, value in item.values.items():
            if not is_mlflow_name(name):
                self._report(
                    f"metric name {name!r} is not legal in MLflow; left out at step {item.step}"
                )
            elif item.step > last.get(name, -1):
                metrics.append(Metric(name, float(value), item.timestamp_ms, item.step))
        for start in range(0, len(metrics), MAX_METRICS_PER_REQUEST):
            batch = metrics[start : start + MAX_METRICS_PER_REQUEST]
            self._handle.client.log_batch(self._handle.run_id, metrics=batch)

    def _send_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        known = self._handle.known_params
        changed = {f"resume/{k}": text for k, text in params.items() if known.get(k, text) != text}
        fresh = [Param(name, text) for name, text in params.items() if name not in known]
        for start in range(0, len(fresh), MAX_ITEMS_PER_REQUEST):
            batch = fresh[start : start + MAX_ITEMS_PER_REQUEST]
            self._handle.client.log_batch(self._handle.run_id, params=batch)
        self._handle.known_params = {**params, **known}
        if changed:
            self._send_tags(changed)

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        pairs = [RunTag(name, text) for name, text in tags.items()]
        for start in range(0, len(pairs), MAX_ITEMS_PER_REQUEST):
            batch = pairs[start : start + MAX_ITEMS_PER_REQUEST]
            self._handle.client.log_batch(self._handle.run_id, tags=batch)

    def _terminate(self) -> None:
        self._handle.client.set_terminated(self._handle.run_id, self._outcome)
