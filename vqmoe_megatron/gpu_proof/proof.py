"""Runs the parts, one after the other, each in a process of its own, within the budget.

1. A part that has passed is not run again (``record.py`` says when).
2. The parts that are left share the budget by their minutes; what one does not use, the later ones
   have. A part that begins with nearly no time left is written down as not run.
3. A part is a child process with a time limit: an error on the device poisons a process, and a
   kernel may hang. It is told a little less time than its limit, so that it can end by itself.
4. However it ended, what it said is written down, and the next one begins.
5. A stop signal ends the child; what is done stays.

The children print to ``PART.log``; their lines of progress come to the terminal too.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from vqmoe_megatron.bench.origin import PACKAGE
from vqmoe_megatron.gpu_proof.card import source_facts
from vqmoe_megatron.gpu_proof.part import MARK, PARTS, Part, read_findings
from vqmoe_megatron.gpu_proof.record import (
    FAILED,
    INCOMPLETE,
    INDEX,
    NOT_RUN,
    PASSED,
    Record,
    check_ours,
    judged,
    read_record,
    write_index,
    write_record,
)
from vqmoe_megatron.gpu_proof.wheels import install_wheels, read_manifest
from vqmoe_megatron.launch.local_ranks import stop_signals_to_handle
from vqmoe_megatron.runtime.exit_codes import end_in_words

LEAST_SECONDS = 10.0  # with less left no part is begun
OWN_END_SHARE, MOST_OWN_END_SECONDS = 0.1, 15.0  # of its limit, for a part to end by itself
GRACE_SECONDS = 15.0  # from SIGTERM to SIGKILL
POLL_SECONDS = 0.1
KEPT_LINES = 40
EXIT_PASSED, EXIT_NOT_PASSED, SIGNAL_BASE = 0, 1, 128


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Raises:
        ValueError: for a budget that is no positive number of minutes.
    """

    out: Path
    parts: tuple[Part, ...]
    budget_minutes: float
    device: str | None = None  # None: cuda where there is one
    is_tiny: bool = False
    again: bool = False
    wheels: Path | None = None
    failing: Sequence[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 < self.budget_minutes < float("inf"):
            raise ValueError(f"--budget-min {self.budget_minutes}: give minutes above 0")

    @property
    def size(self) -> str:
        """As results name it."""
        return "tiny" if self.is_tiny else "full"


def run_proof(request: Request) -> int:
    """Run what is asked for; return the exit code.

    Raises:
        ValueError: for a device that is not here, damaged wheels, files of others where results
            go, or results that are none.
    """
    started = time.monotonic()
    device = request.device or _device_here()
    if device == "cuda" and request.device is not None and _device_here() != "cuda":
        raise ValueError("--device cuda, but torch sees no CUDA device here; use --device cpu")
    out = request.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    check_ours(out)
    with tempfile.TemporaryDirectory(prefix="vqmoe_gpu_proof_") as scratch, _Stop() as stop:
        carried = None if request.wheels is None else read_manifest(request.wheels)
        source = source_facts(carried and carried["source"])
        write_index(out, PARTS)  # from here on the folder is ours, whatever happens
        packages: list[Path] = []
        if request.wheels is not None:
            packages = [Path(scratch) / "packages"]
            install_wheels(request.wheels, packages[0])
        known = {part.name: read_record(out, part.name) for part in PARTS}
        left = [
            part
            for part in request.parts
            if request.again
            or (record := known[part.name]) is None
            or not record.is_done_for(source, request.size, device)
        ]
        for part in request.parts:
            if part not in left:
                print(f"{part.name}: has passed, from this source; --again runs it again")
        environment = _environment(device, packages)
        for number, part in enumerate(left):
            if stop.number is not None:
                break
            shares = [one.minutes for one in left]
            share = sum(shares[: number + 1]) / sum(shares)
            limit = share * request.budget_minutes * 60 - (time.monotonic() - started)
            record = _Attempt(request, part, device, source, limit, out).run(
                Path(scratch) / part.name, environment, stop
            )
            write_record(out, record)
            write_index(out, PARTS)
            print(f"{part.name}: {record.status}{record.reason and f': {record.reason}'}")
        stopped = "" if stop.number is None else f"stopped by {signal.Signals(stop.number).name}"
        write_index(out, PARTS, stopped)
        print(f"results: {out / INDEX}", flush=True)
        if stop.number is not None:
            return SIGNAL_BASE + stop.number
    records = [read_record(out, part.name) for part in request.parts]
    has_passed = all(record is not None and record.status == PASSED for record in records)
    return EXIT_PASSED if has_passed else EXIT_NOT_PASSED


def _device_here() -> str:
    """Asked in a process of its own: this one shall hold no memory of a device."""
    program = "import torch; print(torch.cuda.is_available())"
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    if answer.returncode != 0:
        raise ValueError(f"torch cannot be imported here:\n{answer.stderr.strip()}")
    return "cuda" if answer.stdout.strip().endswith("True") else "cpu"


def _environment(device: str, packages: Sequence[Path]) -> dict[str, str]:
    """Of the children: this package, then what was carried along, then what is here."""
    paths = [str(PACKAGE.parent), *map(str, packages)]
    if os.environ.get("PYTHONPATH"):
        paths.append(os.environ["PYTHONPATH"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


class _Stop:
    """Remembers a stop signal and passes it to whoever asked to be told."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._tell: Callable[[], None] = lambda: None

    def __enter__(self) -> _Stop:
        self._previous = {
            number: signal.signal(number, self._on_signal) for number in stop_signals_to_handle()
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._tell()

    @contextmanager
    def telling(self, tell: Callable[[], None]) -> Iterator[None]:
        """Call ``tell`` at a signal within, and at once if one came."""
        self._tell = tell
        try:
            if self.number is not None:
                tell()
            yield
        finally:
            self._tell = lambda: None


@dataclass(frozen=True)
class _Attempt:
    """One run of one part."""

    request: Request
    part: Part
    device: str
    source: dict
    limit: float  # seconds
    out: Path

    def run(self, work: Path, environment: dict[str, str], stop: _Stop) -> Record:
        began = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        started = time.monotonic()
        work.mkdir()
        ending, tail = (NOT_RUN, "budget"), []
        if self.limit >= LEAST_SECONDS:
            print(f"{self.part.name}: at most {self.limit:.0f} s", flush=True)
            ending, tail = self._run_child(work, environment, stop)
        findings = read_findings(work)
        if ending is None:
            ending = judged(findings)
        elif ending[0] == FAILED and not findings.error:
            findings.error = [ending[1], *tail]
        return Record(
            part=self.part.name,
            title=self.part.title,
            status=ending[0],
            reason=ending[1],
            size=self.request.size,
            device=self.device,
            started=began,
            seconds=time.monotonic() - started,
            limit_seconds=max(0.0, self.limit),
            budget_minutes=self.request.budget_minutes,
            source=self.source,
            **vars(findings),
        )

    def _run_child(
        self, work: Path, environment: dict[str, str], stop: _Stop
    ) -> tuple[tuple[str, str] | None, list[str]]:
        """Return status and reason, None where what it said decides; and its last lines."""
        own_end = min(MOST_OWN_END_SECONDS, OWN_END_SHARE * self.limit)
        command = [sys.executable, "-m", "vqmoe_megatron.gpu_proof.child", self.part.name]
        command += ["--device", self.device, "--seconds", f"{self.limit - own_end:.1f}"]
        command += ["--work", str(work), "--out", str(self.out)]
        command += ["--tiny"] * self.request.is_tiny
        command += ["--fail"] * (self.part.name in self.request.failing)
        deadline = time.monotonic() + self.limit
        with (self.out / f"{self.part.name}.log").open("w", encoding="utf-8") as log:
            # A session of its own: all of it can be ended, and a terminal's Ctrl-C comes to us.
            child = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            tail: deque[str] = deque(maxlen=KEPT_LINES)
            reader = threading.Thread(target=_copy, args=(child.stdout, log, tail), daemon=True)
            reader.start()
            timed_out = False
            try:
                with stop.telling(lambda: _signal_session(child, signal.SIGTERM)):
                    while child.poll() is None and stop.number is None and not timed_out:
                        time.sleep(POLL_SECONDS)
                        timed_out = time.monotonic() > deadline
            finally:
                _end_session(child)
                reader.join(timeout=GRACE_SECONDS)
        if stop.number is not None:
            return (INCOMPLETE, f"stopped by {signal.Signals(stop.number).name}"), list(tail)
        if timed_out:
            return (FAILED, f"time limit of {self.limit:.0f} s"), list(tail)
        if child.returncode != 0:
            said = read_findings(work).error
            how = said[0] if said else f"its process {end_in_words(child.returncode)}"
            return (FAILED, how), list(tail)
        return None, list(tail)


def _copy(lines: Iterator[str], log, tail: deque[str]) -> None:  # noqa: ANN001
    """Everything to the log, lines of progress to the terminal."""
    for line in lines:
        log.write(line)
        log.flush()
        tail.append(line.rstrip())
        if line.startswith(MARK):
            print(line.removeprefix(MARK), end="", flush=True)


def _signal_session(child: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _end_session(child: subprocess.Popen) -> None:
    """End a child and what it started: asked first, then killed."""
    if child.poll() is None:
        _signal_session(child, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=GRACE_SECONDS)
    _signal_session(child, signal.SIGKILL)
    child.wait()
