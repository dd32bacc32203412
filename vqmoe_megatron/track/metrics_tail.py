"""Reading ``metrics.jsonl`` while it is written: the new records since the last look.

The log is the queue between training and shipping. It has room for any outage, and what was not
shipped when a process was killed is still in it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from vqmoe_megatron.rundir.file_names import METRICS_FILE
from vqmoe_megatron.track.metrics_log import decode_record

Record = dict[str, int | float]


class MetricsTail:
    """The records of ``<run_dir>/metrics.jsonl``, or of another log there, in order, each once.

    Follows the log when it is replaced by a shorter one. ``read`` belongs to one thread,
    ``rewind`` may be called from another. Neither communicates.
    """

    def __init__(
        self, run_dir: str | Path, report: Callable[[str], None], file_name: str = METRICS_FILE
    ) -> None:
        self.path = Path(run_dir) / file_name
        self._report = report
        self._lock = threading.Lock()
        self._last_iteration = -1  # iterations in the log only grow
        self._offset_bytes = 0
        self._file_number: int | None = None  # inode: a replaced log is another file

    def read(self, max_records: int) -> list[Record]:
        """Return up to ``max_records`` new records, oldest first; damaged lines are reported.

        Raises:
            OSError: the log exists and cannot be read.
        """
        with self._lock:
            records: list[Record] = []
            try:
                file = self.path.open("rb")
            except FileNotFoundError:
                return records
            with file:
                number = self.path.stat().st_ino
                if number != self._file_number:
                    self._file_number, self._offset_bytes = number, 0
                file.seek(self._offset_bytes)
                while len(records) < max_records:
                    line = file.readline()
                    if not line.endswith(b"\n"):  # the end, or a line that is being written
                        break
                    self._offset_bytes += len(line)
                    try:
                        record = decode_record(line)
                        iteration = int(record["iteration"])
                    except (ValueError, AttributeError, KeyError, TypeError) as error:
                        self._report(f"{self.path}: a damaged line is left out ({error})")
                        continue
                    if iteration > self._last_iteration:
                        self._last_iteration = iteration
                        records.append(record)
            return records

    def skip(self, iteration: int) -> None:
        """Leave out records up to ``iteration``; before the first read."""
        with self._lock:
            self._last_iteration = iteration

    def rewind(self, iteration: int) -> None:
        """Read the records after ``iteration`` again: training went back there."""
        with self._lock:
            self._last_iteration = min(self._last_iteration, iteration)
            self._offset_bytes = 0
