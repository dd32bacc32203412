"""``metrics.jsonl``: one strict-JSON object per logged iteration, the source of truth of a run.

Floats are written at full precision (Python's shortest round-trip form). JSON has no NaN or
infinity, so these three become the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which
:func:`read_metrics` turns back into floats; every line stays readable by any JSON parser.
Each line is flushed, so a process killed with -9 loses at most the line it was writing. Lines that
a full disk refuses are kept and written when it has room again; training goes on meanwhile.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path

from vqmoe_megatron.metrics.table import check_metric_names
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.file_names import METRICS_FILE

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encode_record(record: Mapping[str, object]) -> str:
    """Return one record of numbers (numpy scalars too) as a JSON line without its newline.

    ``ValueError``: an unknown metric name, no ``iteration``, or a value that is not a number.
    """
    check_metric_names(record)
    if "iteration" not in record:
        raise ValueError(
            f"a metrics record needs 'iteration'; got only {', '.join(record) or 'nothing'}"
        )
    return json.dumps(
        {name: _encode_number(name, value) for name, value in record.items()}, allow_nan=False
    )


def _encode_number(name: str, value: object) -> int | float | str:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(
            f"metric {name} is a {type(value).__name__}, not a number (tensors: call .item())"
        )
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")


def _iteration_of(line: bytes) -> float | None:
    """The iteration of one line of a log; None when the line is no record."""
    try:
        return decode_record(line)["iteration"]
    except (ValueError, AttributeError, KeyError, TypeError):
        return None


def read_metrics(path: str | Path) -> list[dict[str, int | float]]:
    """Read ``metrics.jsonl`` (or the run directory holding it), oldest record first.

    A last line without its newline was cut by a kill and is left out. A damaged line elsewhere
    is a ``ValueError`` with its number; a missing file is a ``FileNotFoundError``.
    """
    path = Path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    records = []
    for number, line in enumerate(_complete_lines(path.read_bytes()), start=1):
        try:
            records.append(decode_record(line))
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is not a metrics record: {error}") from error
    return records


def decode_record(line: bytes) -> dict[str, int | float]:
    """Return the record of one line.

    Raises ``ValueError``, ``AttributeError``, ``KeyError`` or ``TypeError`` for another line.
    """
    return {name: _decode_number(value) for name, value in json.loads(line).items()}


def _decode_number(value: object) -> int | float:
    if isinstance(value, str):
        return _NON_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value


def _complete_lines(content: bytes) -> list[bytes]:
    return content[: content.rfind(b"\n") + 1].splitlines()


class MetricsLog:
    """Appends records to ``<run_dir>/metrics.jsonl``; for one process (rank 0), no communication.

    ``file_name``: :data:`SYSTEM_METRICS_FILE` for the other log of a run.
    Opening repairs a file whose last line was cut by a kill, and says so.
    """

    _refused: bytes  # lines that the disk has not taken yet

    def __init__(self, run_dir: str | Path, file_name: str = METRICS_FILE) -> None:
        self.path = Path(run_dir) / file_name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._refused = b""
        self._open()
        self._cut_half_line()

    def _open(self) -> None:
        self._file = self.path.open("ab", buffering=0)

    def _cut_half_line(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            if not content[whole:].startswith(b"{"):  # nothing that this class writes
                self._keep_a_copy()
            os.truncate(self.path, whole)
            print(f"{self.path}: removed a half-written last line of {len(content) - whole} bytes")

    def _keep_a_copy(self) -> None:
        """Copy the whole file beside itself: what is removed may be somebody's."""
        number = 1
        while (copy := self.path.with_name(f"{self.path.name}.before_{number}")).exists():
            number += 1
        shutil.copyfile(self.path, copy)
        print(f"{self.path}: kept as it was in {copy.name}")

    def append(self, record: Mapping[str, object]) -> None:
        """Write one record; ``ValueError`` as in :func:`encode_record`.

        A line that cannot be written is reported and kept for the next call.
        """
        was_refused, lines = self._refused, self._refused + (encode_record(record) + "\n").encode()
        whole_bytes = os.fstat(self._file.fileno()).st_size
        try:
            rest = lines
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            os.ftruncate(self._file.fileno(), whole_bytes)  # no half line stays
            self._refused = lines
            if not was_refused:
                print(f"{self.path} cannot be written: {error}; lines are kept for later")
        else:
            self._refused = b""

    def truncate_after(self, iteration: int) -> int:
        """Remove the records beyond ``iteration`` atomically; return how many were removed.

        Called on resume, so that the log follows the checkpoint and not the lost attempt. Lines
        that are no records, as a node without power may leave, go too; that is said, and a copy of
        the file is kept.
        """
        refused = _complete_lines(self._refused)
        still = [line for line in refused if json.loads(line)["iteration"] <= iteration]
        self._refused = b"".join(line + b"\n" for line in still)
        lines = _complete_lines(self.path.read_bytes())
        iterations = [_iteration_of(line) for line in lines]
        if num_damaged := iterations.count(None):
            self._keep_a_copy()
            print(f"{self.path}: removed {num_damaged} lines that are no metrics records")
        kept = [
            line
            for line, its in zip(lines, iterations, strict=True)
            if its is not None and its <= iteration
        ]
        if len(kept) == len(lines):
            return 0
        replace_file(self.path, b"".join(line + b"\n" for line in kept))
        self._file.close()
        self._open()
        return len(lines) - len(kept)

    @property
    def last_iteration(self) -> int:
        """Of the last record in the file; 0 where there is none."""
        lines = _complete_lines(self.path.read_bytes())
        return int(_iteration_of(lines[-1]) or 0) if lines else 0

    def close(self) -> None:
        """Close the file; what the disk still refuses is lost, and said so."""
        self._file.close()
        if self._refused:
            num_lost = self._refused.count(b"\n")
            print(f"{self.path}: the last {num_lost} records could not be written and are lost")

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
