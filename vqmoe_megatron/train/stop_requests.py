"""Who may ask a run to stop or to save, and how all ranks come to know.

A signal handler only raises a flag. The flags of every rank are max-reduced with each step, so all
ranks act on the same step boundary.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from vqmoe_megatron.launch.local_ranks import (
    STARTER_VARIABLE,
    STOP_SIGNALS,
    stop_signals_to_handle,
)
from vqmoe_megatron.rundir.file_names import SAVE_FILE, STOP_FILE

NO_REQUEST, TIME_LIMIT, STOP_FILE_FOUND, STARTER_GONE, SIGNAL = range(5)
REASONS = {
    TIME_LIMIT: "train.exit_duration_in_mins is over",
    STOP_FILE_FOUND: f"found the file {STOP_FILE} in the run directory",
    STARTER_GONE: "the process that started the ranks is gone",
    SIGNAL: "received a stop signal",
}


class StopRequests:
    """Collects this rank's reasons to stop. Create it first: signals may come during start-up.

    Ranks that :mod:`vqmoe_megatron.launch.local_ranks` started come with the stop signals blocked,
    which keeps one sent before this moment pending; it is received here.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._signal_received = False
        starter = environ.get(STARTER_VARIABLE)
        self._starter_pid = int(starter) if starter else None
        self._deadline: float | None = None
        self._stop_file: Path | None = None
        self._save_file: Path | None = None
        for number in stop_signals_to_handle():
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal_received = True

    def watch(self, run_dir: Path, minutes: float | None, polls_files: bool) -> None:
        """Watch the time limit from now on and, on one rank, the files ``STOP`` and ``SAVE``."""
        if minutes is not None:
            self._deadline = time.monotonic() + minutes * 60
        self._stop_file = run_dir / STOP_FILE if polls_files else None
        self._save_file = run_dir / SAVE_FILE if polls_files else None

    def wants_save(self) -> bool:
        """Tell whether the save file is there: save at this step and go on."""
        return self._save_file is not None and self._save_file.is_file()

    def save_was_seen(self, was_requested: bool) -> None:
        """Remove the save file after a save that it asked for."""
        if was_requested and self._save_file is not None:
            self._save_file.unlink(missing_ok=True)

    def current(self) -> int:
        """Return this rank's most urgent request."""
        if self._signal_received:
            return SIGNAL
        if self._starter_pid is not None and os.getppid() != self._starter_pid:
            return STARTER_GONE
        if self._stop_file is not None and self._stop_file.is_file():
            return STOP_FILE_FOUND
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return TIME_LIMIT
        return NO_REQUEST

    def close(self) -> None:
        """Ignore stop signals from now on: all is saved and said, and the process is ending.

        The interpreter's end takes handlers away, and a signal that comes later would kill it.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def acknowledge(self) -> None:
        """Remove the stop file, so that the next start of the run goes on."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)
