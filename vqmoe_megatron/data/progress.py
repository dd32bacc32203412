"""Progress of ``prepare``: a rich bar on a terminal, plain lines in a log file."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)

PLAIN_INTERVAL_S = 10.0


class PrepareProgress:
    """Counts bytes per stage. Use as a context manager; :meth:`note` prints a line at any time."""

    def __init__(self) -> None:
        self._console = Console(soft_wrap=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._stage = ""
        self._total_bytes = 0
        self._done_bytes = 0
        self._started_s = self._printed_s = 0.0

    def stage(self, name: str, total_bytes: int) -> None:
        """Begin a stage over ``total_bytes`` of text."""
        self._stage, self._total_bytes, self._done_bytes = name, total_bytes, 0
        self._started_s = self._printed_s = time.monotonic()
        if self._console.is_terminal:
            self._task = self._bar.add_task(name, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        """Count ``num_bytes`` more of the stage as done."""
        self._done_bytes += num_bytes
        if self._task is not None:
            self._bar.advance(self._task, num_bytes)
            return
        now_s = time.monotonic()
        if self._done_bytes >= self._total_bytes or now_s - self._printed_s >= PLAIN_INTERVAL_S:
            self._printed_s = now_s
            megabytes_per_s = self._done_bytes / 1e6 / max(now_s - self._started_s, 1e-9)
            self.note(
                f"{self._stage}: {self._done_bytes / 1e6:.1f} of {self._total_bytes / 1e6:.1f} MB, "
                f"{megabytes_per_s:.0f} MB/s"
            )

    def note(self, text: str) -> None:
        """Print one line."""
        self._console.print(text, markup=False)

    def __enter__(self) -> PrepareProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()
