"""A tracker that follows the run's logs from a thread of its own.

The logs are the queue: what a store was not given, because it was down or the process was killed,
is still in them. A store says up to which iteration it has each log, and gets the rest.

What a store raises is reported once; its thread ends there, and training goes on.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping

from vqmoe_megatron.rundir.file_names import METRICS_FILE, SYSTEM_METRICS_FILE
from vqmoe_megatron.track.metrics_tail import MetricsTail, Record
from vqmoe_megatron.track.tracker import TrackedRun, Tracker

LOGS = (METRICS_FILE, SYSTEM_METRICS_FILE)
RECORDS_PER_READ = 100
IDLE_POLL_S = 5.0  # a call wakes the thread; this is for logs that could not be read


class LogFollower(Tracker):
    """Hands new records of both logs, and the run's other calls, to a store, in one thread.

    Args:
        run: what is tracked.
        name: of the store, for messages.
    """

    def __init__(self, run: TrackedRun, name: str) -> None:
        super().__init__(run)
        self._name = name
        self._tails = {log: MetricsTail(run.run_dir, self._tell, log) for log in LOGS}
        self._calls: list[Callable[[], None]] = []  # of the training thread, in order
        self._lock, self._wake = threading.Lock(), threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._follow, name=f"{name}-log", daemon=True)

    # For stores; all of them run in the thread.
    @abstractmethod
    def begin(self) -> dict[str, int]:
        """Open the store; return by log the last iteration that it has of this run, else -1."""

    @abstractmethod
    def write(self, log: str, records: list[Record]) -> None:
        """Keep records, oldest first, so that they are there when this returns."""

    def cut(self, iteration: int) -> None:
        """Records after ``iteration`` were of steps that are trained again, and will come anew."""

    def end(self, state: str) -> None:
        """Close the store."""

    # For the run; all of them return at once.
    def start(self) -> LogFollower:
        """Begin to follow."""
        self._thread.start()
        return self

    def call(self, action: Callable[[], None]) -> None:
        """Let the thread do ``action`` in its turn."""
        with self._lock:
            self._calls.append(action)
        self._wake.set()

    def metrics_logged(self, record: Mapping[str, int | float]) -> None:
        """Wake the thread: it reads the record from its log."""
        self._wake.set()

    def rolled_back(self, iteration: int) -> None:
        """Let the store forget, and read on from there."""

        def go_back() -> None:
            self.cut(iteration)
            for tail in self._tails.values():
                tail.rewind(iteration)

        self.call(go_back)

    def finish(self, state: str, deadline_s: float) -> None:
        """Write what is left and close, for at most ``deadline_s`` seconds."""
        self.call(lambda: self._finish(state))
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            self._tell(f"not everything was written within {deadline_s:g} s; the logs hold it all")

    def _tell(self, text: str) -> None:
        self.run.report(f"{self._name}: {text}")

    # The thread.
    def _follow(self) -> None:
        try:
            for log, iteration in self.begin().items():
                self._tails[log].skip(iteration)
            while not self._is_over:
                self._wake.clear()
                with self._lock:
                    calls, self._calls = self._calls, []
                for action in calls:
                    action()
                if not self._is_over:
                    self._read()
                    self._wake.wait(IDLE_POLL_S)
        except Exception as error:  # a store's faults must never end training
            self._tell(
                f"stops here: {type(error).__name__}: {error}; training goes on, and the logs hold "
                "every metric"
            )

    def _read(self) -> None:
        for log, tail in self._tails.items():
            while records := tail.read(RECORDS_PER_READ):
                self.write(log, records)

    def _finish(self, state: str) -> None:
        self._read()
        self.end(state)
        self._is_over = True
