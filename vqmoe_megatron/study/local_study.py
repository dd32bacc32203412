"""Running a study on this machine: one process per run, so many at a time.

The cores are shared among the ranks of all runs at a time, and ``OMP_NUM_THREADS`` says each rank's
share, unless it is set. A run of several ranks waits until its ranks have cores beside the others'
ranks; alone it always runs.

A stop signal (Ctrl-C, SIGTERM, SIGUSR1, a lost terminal) is passed on to the runs, which save and
end; nothing new is started. A run that fails does not stop the others. When this process is killed
hard, the kernel tells its runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from vqmoe_megatron.launch.local_ranks import STOP_SIGNALS, stop_signals_to_handle
from vqmoe_megatron.runtime.exit_codes import end_in_words
from vqmoe_megatron.study.local_display import LocalDisplay
from vqmoe_megatron.study.planned_run import PlannedRun
from vqmoe_megatron.study.run_state import RunState, run_state
from vqmoe_megatron.study.study import Study
from vqmoe_megatron.study.study_table import num_runs
from vqmoe_megatron.study.study_task import STARTER_VARIABLE

POLL_SECONDS = 0.2
# What a launcher tells its ranks; a run of a study is a world of its own.
WORLD_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_STEP_ID",
)
EXIT_DONE, EXIT_CRASH, EXIT_USAGE, EXIT_REQUEUE = 0, 1, 2, 75


@dataclass(frozen=True)
class _Started:
    run: PlannedRun
    process: subprocess.Popen
    log: Path
    log_start_bytes: int
    start_seconds: float


class LocalStudy:
    """Runs the chosen runs of a study; see the file's head."""

    def __init__(
        self,
        study: Study,
        chosen: Mapping[int, PlannedRun],
        num_jobs: int,
        display: LocalDisplay,
    ) -> None:
        self.study = study
        self.display = display
        self.num_jobs = num_jobs
        self.states = {index: run_state(run) for index, run in chosen.items()}
        self._chosen = chosen
        self._num_cores = len(os.sched_getaffinity(0))
        self._active: dict[int, _Started] = {}
        self._stop_signal: int | None = None
        self._has_failed = False

    def run(self) -> int:
        """Run what is unfinished; return the exit code: 0 all finished, 1 one failed, 75 some are
        not finished, because of a stop request or because another process has them."""
        waiting = [index for index, state in self.states.items() if not state.is_finished]
        self.display.say(
            f"{num_runs(len(self._chosen))}, {len(waiting)} unfinished, {self.num_jobs} at a time, "
            f"{self._threads_in_words()}; logs in {self.study.folder.logs}"
        )
        with self._forwarded_signals(), self.display:
            elsewhere = self._work_through(waiting, "running elsewhere: looked at again at the end")
            if elsewhere and self._stop_signal is None:
                self._work_through(elsewhere, "still running elsewhere: left alone")
        return self._exit_code()

    def _work_through(self, waiting: list[int], elsewhere_text: str) -> list[int]:
        """Run what is unfinished of ``waiting``; return the runs that another process has."""
        elsewhere: list[int] = []
        while self._active or (waiting and self._stop_signal is None):
            while waiting and self._stop_signal is None and self._has_room(waiting[0]):
                index = waiting.pop(0)
                state = self.states[index] = run_state(self._chosen[index])  # it may have moved on
                if state.state == "running":
                    self.display.say(f"{self._chosen[index].name} is {elsewhere_text}")
                    elsewhere.append(index)
                elif not state.is_finished:
                    self._start(index)
            if self._active:
                time.sleep(POLL_SECONDS)
            self._look()
        return elsewhere

    def _has_room(self, index: int) -> bool:
        """Whether this run may start beside the active ones."""
        if len(self._active) >= self.num_jobs:
            return False
        num_ranks = self._chosen[index].num_ranks
        num_active_ranks = sum(started.run.num_ranks for started in self._active.values())
        most_ranks = max(self._num_cores, self.num_jobs)  # so runs of one rank start as asked
        return not self._active or num_active_ranks + num_ranks <= most_ranks

    def _num_threads(self, num_ranks: int) -> int:
        """Threads of each rank of a run, whichever runs are beside it."""
        num_at_once = max(1, min(self.num_jobs, self._num_cores // num_ranks))
        return max(1, self._num_cores // (num_at_once * num_ranks))

    def _threads_in_words(self) -> str:
        """What the runs may use of the cores, before any starts."""
        if "OMP_NUM_THREADS" in os.environ:
            return f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} of the environment per rank"
        each = {self._num_threads(run.num_ranks) for run in self._chosen.values()}
        words = " to ".join(map(str, sorted({min(each), max(each)})))
        return f"OMP_NUM_THREADS={words} per rank on {self._num_cores} cores"

    def _exit_code(self) -> int:
        if self._has_failed:
            return EXIT_CRASH
        is_done = all(state.is_finished for state in self.states.values())
        return EXIT_DONE if is_done else EXIT_REQUEUE

    @contextmanager
    def _forwarded_signals(self) -> Iterator[None]:
        previous = {
            number: signal.signal(number, self._on_signal) for number in stop_signals_to_handle()
        }
        try:
            yield
        finally:
            for started in self._active.values():  # only after an error of our own
                started.process.send_signal(signal.SIGTERM)
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_signal = number
        for started in self._active.values():
            if started.process.poll() is None:
                started.process.send_signal(number)

    def _start(self, index: int) -> None:
        run, log = self._chosen[index], self.study.log_of[index]
        environment = run_environment(os.environ, self._num_threads(run.num_ranks))
        command = [sys.executable, "-m", "vqmoe_megatron.cli", "study", "task"]
        command += [str(self.study.folder.study_copy), "--index", str(index)]
        # Blocked, a stop signal waits: here until the run is known, and in the run, which inherits
        # the mask, until it can save.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with log.open("ab") as output:
                log_start_bytes = output.tell()
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a terminal's Ctrl-C comes through _on_signal, once
                )
            self._active[index] = _Started(run, process, log, log_start_bytes, time.monotonic())
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        self.display.started(run.name, index)

    def _look(self) -> None:
        """Take note of runs that ended and show how the others are."""
        if self._stop_signal is not None:
            self.display.stopping(signal.Signals(self._stop_signal).name, len(self._active))
        for index, started in list(self._active.items()):
            code = started.process.poll()
            if code is None:
                self.display.progress(started.run, index)
                continue
            del self._active[index]
            self.states[index] = _ended_state(started, code)
            self._has_failed |= self.states[index].state == "failed"
            seconds = time.monotonic() - started.start_seconds
            self.display.ended(started.run.name, index, self.states[index], seconds, started.log)
        self.display.counts(list(self.states.values()), len(self._active))


def run_environment(environ: Mapping[str, str], num_threads: int) -> dict[str, str]:
    """Return the environment of a run: ours without the world we may have been started in."""
    kept = {name: value for name, value in environ.items() if name not in WORLD_VARIABLES}
    return {"OMP_NUM_THREADS": str(num_threads), **kept, STARTER_VARIABLE: str(os.getpid())}


def _ended_state(started: _Started, code: int) -> RunState:
    """Judge by status.json; a run that could not write one is judged by how its process ended."""
    state = run_state(started.run)
    if code in (EXIT_DONE, EXIT_REQUEUE) and state.state != "waiting":
        return state
    if code == EXIT_CRASH and state.state == "failed":
        return state
    reason = end_in_words(code)
    if code == EXIT_USAGE:
        reason = _last_error(started) or reason
    return replace(state, state="failed", reason=reason)


def _last_error(started: _Started) -> str:
    """Return the first line of the last ``error:`` message of this attempt."""
    with started.log.open("rb") as file:
        file.seek(started.log_start_bytes)
        lines = file.read().decode("utf-8", "replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else ""
