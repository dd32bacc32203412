"""Shipping a run to MLflow from one background thread, never at the cost of a training step.

1. Metrics are in ``metrics.jsonl`` before this file hears of them. The thread reads what is new
   there and sends it in order, so an outage of any length costs no memory and leaves no hole.
   Params, tags and files wait in a short queue; one too many is dropped and counted.
2. A store that is down is tried again with growing pauses. A point carries the time of its record,
   so sending it twice stores it once.
3. A resumed run sends what the store lacks: points after the last step it has, by metric. Steps
   that were sent and are trained again keep their first values there; a tag says which.
4. ``finish`` sends what is left, sets the run's status, and gives up at its deadline with an
   account of what was not sent. ``vqmoe mlflow-sync`` sends that later.

No method communicates with other ranks. What belongs to MLflow alone is known here: the record
``mlflow.json``, the run id of a checkpoint, the parent run, its words for how a run ended.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vqmoe_megatron.rundir.file_lock import LockWait
from vqmoe_megatron.rundir.file_names import METRICS_FILE, SYSTEM_METRICS_FILE
from vqmoe_megatron.rundir.waiting import tell_nobody
from vqmoe_megatron.runtime.optional_packages import missing
from vqmoe_megatron.track.attempt_tags import attempt_tags
from vqmoe_megatron.track.metrics_tail import MetricsTail
from vqmoe_megatron.track.mlflow.errors import first_line
from vqmoe_megatron.track.mlflow.record import MlflowRecord, open_record
from vqmoe_megatron.track.mlflow.run_params import (
    MAX_PARAM_CHARACTERS,
    MAX_TAG_CHARACTERS,
    shortened,
)
from vqmoe_megatron.track.mlflow.store import (
    OUTCOME_OF_STATE,
    Outcome,
    RunHandle,
    RunRequest,
    default_mlflow_uri,
    open_run,
)
from vqmoe_megatron.track.mlflow.store_retry import LONGEST_PAUSE_S, StoreRetry
from vqmoe_megatron.track.mlflow.untracked import UntrackedRun
from vqmoe_megatron.track.mlflow.writer import (
    metric_batches,
    send_metrics,
    send_params,
    send_tags,
)
from vqmoe_megatron.track.tracker import TrackedRun, Tracker

if TYPE_CHECKING:
    from mlflow.entities import Metric

ARTIFACT_ATTEMPTS = 3  # a broken artifact store must not hold up the metrics
MAX_PENDING_ITEMS = 1000  # params, tags and files; a run has a handful per checkpoint
RECORDS_PER_READ = 100
# Shorter than start_deadline_s, so that the first notice says who holds the lock; tried again then.
LOCK_WAIT = LockWait(20.0, tell_nobody)
IDLE_POLL_S = 5.0  # a call wakes the thread; this is for logs that could not be read


@dataclass(frozen=True)
class _Item:
    """One call of the training thread, waiting to be sent."""

    kind: Literal["params", "tags", "artifact"]
    values: dict[str, str | None]


class MlflowTracker(Tracker):
    """Ships params, metrics, tags and files of one run; see the file's head for the guarantees.

    Args:
        uri: of the store; None means :func:`default_mlflow_uri`.
        experiment: created when missing.
        run_name: of a new run; None means the run directory's name.
        run_dir: holds ``metrics.jsonl`` and ``system_metrics.jsonl``.
        record: the directory's ``mlflow.json``.
        resume_run_id: the checkpoint's run, for directories whose record names none.
        start_iteration: where this attempt starts.
        parent_run_id: the run a new run is shown under.
        start_deadline_s: how long to wait for the run to exist, so that ``run_id`` is known; past
            it training goes on and the thread keeps trying.
        max_pending: bound of the queue of params, tags and files.
        report: receives notices (the console's ``message``, or ``print``).
    """

    def __init__(
        self,
        uri: str | None,
        experiment: str,
        run_name: str | None,
        run_dir: str | Path,
        record: MlflowRecord,
        *,
        resume_run_id: str | None = None,
        start_iteration: int = 0,
        parent_run_id: str | None = None,
        start_deadline_s: float = 30.0,
        max_pending: int = MAX_PENDING_ITEMS,
        report: Callable[[str], None] = print,
    ) -> None:
        self.run_dir = Path(run_dir).resolve()
        self.uri = uri or default_mlflow_uri(run_dir)
        self.record = record
        self._request = RunRequest(
            experiment,
            run_name or self.run_dir.name,
            self.run_dir,
            record.run_key,
            record.known_run(self.uri) or resume_run_id,
            parent_run_id,
        )
        self._start_iteration = start_iteration
        self._notices = report
        self._tails = [
            MetricsTail(self.run_dir, self._report, name)
            for name in (METRICS_FILE, SYSTEM_METRICS_FILE)
        ]
        self._batches: deque[list[Metric]] = deque()  # read from the log, not sent yet
        self._sent_until = -1  # iteration; everything in the log up to it was handed over
        self._queue: queue.Queue[_Item] = queue.Queue(max_pending)
        self._handle: RunHandle | None = None
        self._start_settled = threading.Event()  # the run exists, or the first attempt failed
        self._wake = threading.Event()
        self._finishing = threading.Event()
        self._outcome: Outcome = "FINISHED"
        self._lost: Counter[str] = Counter()  # reason -> number of items
        self._retry = StoreRetry(self.uri, self._finishing, self._start_settled, self._report)
        self._thread = threading.Thread(target=self._work, name="mlflow-shipping", daemon=True)
        self._thread.start()
        if not self._start_settled.wait(start_deadline_s):
            self._report(
                f"no run at {self.uri} after {start_deadline_s:g} s; training goes on, still trying"
            )

    @classmethod
    def open(cls, run: TrackedRun) -> Tracker:
        """Open this directory's MLflow run, or a new one when another run starts in it.

        An attempt killed before its first save is the same run; one that reached its end is not. A
        run that starts from another directory's checkpoint is tagged with that one's run id.
        Without MLflow the run is not tracked, and says so.
        """
        record = open_record(run.run_dir, run.report)
        if not run.is_resumed and (record.is_completed or not run.is_same):
            record.forget()
        attempt = record.begin_attempt()
        problem = missing("mlflow")
        tracker = cls._connected(run, record) if problem is None else UntrackedRun(run, record)
        if problem is None:
            run.report(f"mlflow: {tracker.uri} run {tracker.run_id}")
        else:
            run.report(f"not tracked: {problem}; `vqmoe mlflow-sync {run.run_dir}` sends it later")
        facts = {"from_iteration": run.start_iteration, "world_size": run.world_size}
        own = dict(text.split("=", 1) for text in run.config.tracking.tags)
        tracker.set_tags(own | attempt_tags(attempt, facts, os.environ))
        if run.mlflow_run_id is not None and not run.is_resumed:
            tracker.set_tags({"started_from_run": run.mlflow_run_id})
        return tracker

    @classmethod
    def _connected(cls, run: TrackedRun, record: MlflowRecord) -> MlflowTracker:
        tracking = run.config.tracking
        return cls(
            tracking.mlflow_uri,
            tracking.experiment,
            tracking.run_name,
            run.run_dir,
            record,
            resume_run_id=run.mlflow_run_id if run.is_resumed else None,
            start_iteration=run.start_iteration,
            parent_run_id=tracking.parent_run_id,
            report=run.report,
        )

    @property
    def run_id(self) -> str | None:
        """The MLflow run id, ``None`` while the run could not be opened."""
        return self._handle.run_id if self._handle else None

    def log_params(self, params: Mapping[str, object]) -> None:
        """Record parameters; on a resumed run a changed value becomes the tag ``resume/<key>``."""
        self._put(_Item("params", shortened(params, MAX_PARAM_CHARACTERS, self._report)))

    def metrics_logged(self, record: Mapping[str, int | float]) -> None:
        """Wake the thread: it reads the record from its log."""
        self._wake.set()

    def rolled_back(self, iteration: int) -> None:
        """Say that ``metrics.jsonl`` was cut after ``iteration``, to be trained again.

        The new values are sent, too: those of the discarded steps were of another trajectory.
        """
        for tail in self._tails:
            tail.rewind(iteration)
        self._sent_until = min(self._sent_until, iteration)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Upload one file into ``folder`` of the run's artifacts; it must stay until it is sent."""
        self._put(_Item("artifact", {"path": str(path), "folder": folder}))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """Set tags, replacing earlier values; ``mlflow.json`` keeps them for a later sync."""
        texts = shortened(tags, MAX_TAG_CHARACTERS, self._report)
        self.record.note_tags(texts)
        self._put(_Item("tags", texts))

    def checkpoint_saved(self, folder: Path, iteration: int) -> None:
        """Tag the run with it."""
        self.set_tags({"checkpoint": str(folder), "iteration": iteration})

    def finish(self, state: str, deadline_s: float = 20.0) -> None:
        """Send what is left, set the run's status, return by the deadline whatever happens."""
        if self._finishing.is_set():
            return
        if state == "completed":
            self.record.note_completed()
        self._outcome = OUTCOME_OF_STATE[state]
        self._finishing.set()
        self._wake.set()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._report(
                f"gave up after {deadline_s:g} s; {self.uri} may still show the run as RUNNING"
            )
        if self._queue.unfinished_tasks:
            self._lost["params, tags or files not sent"] += self._queue.unfinished_tasks
        num_records = self._num_unsent_records()
        if num_records:
            self._lost["logged iterations not sent"] += num_records
        if self._lost:
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self._lost.items())
            self._report(
                f"not everything reached {self.uri} ({reasons}); metrics.jsonl holds every metric, "
                f"and `vqmoe mlflow-sync {self.run_dir}` sends what is missing"
            )
        self._notices = tell_nobody  # a thread that is still trying has nothing to add to that

    def _num_unsent_records(self) -> int:
        """Records of the log that were not handed over, counted by a reader of its own."""
        tail = MetricsTail(self.run_dir, lambda text: None)
        num_unsent = 0
        try:
            while records := tail.read(RECORDS_PER_READ):
                num_unsent += sum(record["iteration"] > self._sent_until for record in records)
        except OSError as error:
            self._report(f"{tail.path} cannot be read: {error}")
        return num_unsent

    def _report(self, text: str) -> None:
        """Give a notice, unless :meth:`finish` has had the last word."""
        self._notices(f"mlflow: {text}")

    def _put(self, item: _Item) -> None:
        if self._finishing.is_set():
            self._lost["logged after finish"] += 1
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._lost["queue full"] += 1
        self._wake.set()

    # Everything below runs on the background thread only.

    def _work(self) -> None:
        try:
            if self._retry.run("cannot open a run", self._open_run) != "done":
                return
            while True:
                is_last_round = self._finishing.is_set()  # before looking: nothing comes after it
                if not (self._ship_items() and all(map(self._ship_metrics, self._tails))):
                    return  # the store is down and the run is over: leave the rest unsent
                if is_last_round:
                    break
                self._wake.wait(IDLE_POLL_S)
                self._wake.clear()
            self._retry.run("cannot set the run's status", self._terminate)
        except Exception as error:  # a mistake in here must not look like a run without news
            self._report(f"shipping ends here, training goes on: {first_line(error)}")
        finally:
            self._start_settled.set()

    def _ship_items(self) -> bool:
        """Send what is queued; False when the store is down and the run is over."""
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return True
            max_attempts = ARTIFACT_ATTEMPTS if item.kind == "artifact" else None
            send = functools.partial(self._send_item, item)
            result = self._retry.run(f"cannot send {item.kind}", send, max_attempts)
            if result == "unreachable" and self._finishing.is_set():
                return False
            if result != "done":
                self._lost[f"{item.kind} {result}"] += 1
            self._queue.task_done()

    def _ship_metrics(self, tail: MetricsTail) -> bool:
        """Send what is new in one log; False when the store is down and the run is over."""
        last = self._handle.last_steps
        while True:
            try:
                records = tail.read(RECORDS_PER_READ)
            except OSError as error:
                if not self._finishing.is_set():
                    self._report(f"{tail.path} cannot be read: {error}; trying again")
                    self._finishing.wait(LONGEST_PAUSE_S)
                return True
            if not records:
                return True
            now_ms = time.time_ns() // 1_000_000
            self._batches.extend(
                metric_batches(records, lambda name, step: step <= last.get(name, -1), now_ms)
            )
            while self._batches:
                send = functools.partial(send_metrics, self._handle, self._batches[0])
                result = self._retry.run("cannot send metrics", send)
                if result == "unreachable":
                    return False
                if result == "refused":
                    self._lost["metrics refused"] += len(self._batches[0])
                self._batches.popleft()
                if not self._queue.empty() and not self._ship_items():  # tags of a catching-up run
                    return False
            if tail is self._tails[0]:
                self._sent_until = max(self._sent_until, int(records[-1]["iteration"]))

    def _open_run(self) -> None:
        handle = open_run(self.uri, self._request, wait=LOCK_WAIT)
        self.record.note_run(self.uri, handle.run_id)
        self._handle = handle
        if handle.notice:
            self._report(handle.notice)
        self._tag_repeated_steps(max(handle.last_steps.values(), default=-1))
        self._start_settled.set()

    def _tag_repeated_steps(self, last_step: int) -> None:
        """Say which iterations the store has and this attempt trains again."""
        if last_step > self._start_iteration:
            self.set_tags(
                {
                    f"attempt/{self.record.num_attempts:02d}/repeats": (
                        f"iterations {self._start_iteration + 1} to {last_step} are trained again; "
                        "MLflow keeps their first values, metrics.jsonl the last"
                    )
                }
            )

    def _send_item(self, item: _Item) -> None:
        if item.kind == "params":
            send_params(self._handle, item.values)
        elif item.kind == "tags":
            send_tags(self._handle, item.values)
        else:
            values = item.values
            self._handle.client.log_artifact(self._handle.run_id, values["path"], values["folder"])

    def _terminate(self) -> None:
        self._handle.client.set_terminated(self._handle.run_id, self._outcome)
