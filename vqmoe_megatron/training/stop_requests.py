"""Who may ask a run to stop, and how all ranks come to know.

A signal handler only raises a flag. The flag of every rank is max-reduced with each step, so all
ranks act on the same step boundary.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

STOP_FILE = "STOP"

NO_REQUEST, TIME_LIMIT, STOP_FILE_FOUND, SIGNAL = range(4)
REASONS = {
    TIME_LIMIT: "train.exit_duration_in_mins is over",
    STOP_FILE_FOUND: f"found the file {STOP_FILE} in the run directory",
    SIGNAL: "received a stop signal",
}
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequests:
    """Collects this rank's reasons to stop. Create it first: signals may come during start-up."""

    def __init__(self) -> None:
        self._signal_received = False
        self._deadline: float | None = None
        self._stop_file: Path | None = None
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal_received = True

    def watch(self, run_dir: Path, minutes: float | None, polls_stop_file: bool) -> None:
        """Watch the time limit from now on and, on one rank, the stop file of ``run_dir``."""
        if minutes is not None:
            self._deadline = time.monotonic() + minutes * 60
        self._stop_file = run_dir / STOP_FILE if polls_stop_file else None

    def current(self) -> int:
        """Return this rank's most urgent request."""
        if self._signal_received:
            return SIGNAL
        if self._stop_file is not None and self._stop_file.exists():
            return STOP_FILE_FOUND
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return TIME_LIMIT
        return NO_REQUEST

    def acknowledge(self) -> None:
        """Remove the stop file, so that the next start of the run goes on."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)
