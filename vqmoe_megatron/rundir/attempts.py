"""Whether an ended attempt is queued again, and whether a started one may run.

Decided on what the run directory says, never on an exit code:

- ``status.json``: state and reason
- the tracker file of ``checkpoints``: where the next attempt would start
- ``slurm_attempts.tsv``: job, restart, iteration at its start; a line per attempt, written here

An attempt that ended by itself and leaves no newer checkpoint behind than it found would do the
same again. One that was told to stop, a node that dies, and an administrator's requeue say nothing
about the next: :func:`begin_attempt` bounds those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vqmoe_megatron.rundir.file_names import ATTEMPTS_FILE, STATUS_FILE
from vqmoe_megatron.rundir.status import LOST_PEER, read_status
from vqmoe_megatron.rundir.tracker import saved_iteration

NO_STATUS = "none"  # the mark of a status.json that is not there
BEGIN, DONE, REQUEUE, GIVE_UP = "begin", "done", "requeue", "give-up"


@dataclass(frozen=True)
class Attempt:
    """One start of a job: ``restart`` 0 is the first, ``max_restarts`` the last that is allowed."""

    run_dir: Path
    job: str
    restart: int
    max_restarts: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\S+", self.job):
            raise ValueError(f"job {self.job!r} must be a job's name without spaces, such as 40_3")


@dataclass(frozen=True)
class Start:
    """What an attempt found: the newest checkpoint's iteration, and :func:`status_mark`."""

    iteration: int
    mark: str


@dataclass(frozen=True)
class Decision:
    """``verdict``: begin | done | requeue | give-up, and why; as text one line."""

    verdict: str
    reason: str

    def __str__(self) -> str:
        return f"{self.verdict} {' '.join(self.reason.splitlines())}"


def status_mark(run_dir: Path) -> str:
    """Return a word that differs once ``status.json`` has been written again."""
    try:
        status = (run_dir / STATUS_FILE).stat()
    except OSError:
        return NO_STATUS
    return f"{status.st_ino}:{status.st_mtime_ns}"


def begin_attempt(attempt: Attempt, max_idle_attempts: int) -> Decision:
    """Note that an attempt starts; ``begin ITERATION MARK``, the two parts of :class:`Start`.

    ``give-up``, and no note, when it must not: too many restarts, or too many attempts of this job
    in a row that began at the same iteration.

    Raises:
        ValueError: when the note cannot be read or written.
    """
    path, now = attempt.run_dir / ATTEMPTS_FILE, saved_iteration(attempt.run_dir)
    try:
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        num_idle = _num_idle_attempts(text, attempt, now)
        if attempt.restart > attempt.max_restarts:
            return Decision(
                GIVE_UP,
                f"restart {attempt.restart} is more than "
                f"VQMOE_MAX_RESTARTS={attempt.max_restarts} allows",
            )
        if num_idle >= max_idle_attempts:
            return Decision(
                GIVE_UP,
                f"{num_idle} attempts of job {attempt.job} began at iteration {now} and left no "
                f"newer checkpoint (VQMOE_MAX_IDLE_ATTEMPTS={max_idle_attempts})",
            )
        end_of_cut_line = "\n" if text and not text.endswith("\n") else ""
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{end_of_cut_line}{attempt.job}\t{attempt.restart}\t{now}\n")
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written: {error.strerror}; no attempt starts without its note"
        ) from error
    return Decision(BEGIN, f"{now} {status_mark(attempt.run_dir)}")


def _num_idle_attempts(text: str, attempt: Attempt, now: int) -> int:
    """How many attempts of the job in a row, up to now, began at iteration ``now``.

    Where restarts do not go up, the lines before are of another job of that number, on a cluster
    that counts from 1 again. A line that was cut counts for nothing.
    """
    num_idle, last = 0, -1
    for line in text.splitlines():
        match = re.fullmatch(r"(\S+)\t([0-9]+)\t([0-9]+)", line)
        if match is None or match[1] != attempt.job:
            continue
        restart, iteration = int(match[2]), int(match[3])
        before = num_idle if restart > last else 0
        num_idle, last = (before + 1 if iteration == now else 0), restart
    return num_idle if attempt.restart > last else 0


def decide_requeue(attempt: Attempt, start: Start) -> Decision:
    """Decide what follows from how an attempt's ranks ended: done, requeue or give-up."""
    now = saved_iteration(attempt.run_dir)
    if status_mark(attempt.run_dir) == start.mark:
        return Decision(GIVE_UP, "the ranks ended before they wrote a status")
    try:
        status = read_status(attempt.run_dir)
    except ValueError as error:
        return Decision(GIVE_UP, str(error))
    if status is None:
        return Decision(GIVE_UP, f"{attempt.run_dir / STATUS_FILE} is gone")
    if status.slurm_job not in (None, "", attempt.job):
        return Decision(GIVE_UP, f"job {status.slurm_job} trains in this run directory")
    state, reason = status.state, status.reason
    if state == "failed" and LOST_PEER.search(reason):
        state = "running"  # a rank was killed, and another one noticed before srun ended it
    if state == "completed":
        return Decision(DONE, f"iteration {status.iteration}: {reason}")
    if state == "failed":
        return Decision(GIVE_UP, f"the run has state 'failed': {reason}")
    if state == "running" and now <= start.iteration:
        return Decision(
            GIVE_UP,
            f"no progress: the attempt began at iteration {start.iteration} and its newest "
            f"checkpoint is of {now} (state {state}: {reason})",
        )
    if attempt.restart >= attempt.max_restarts:
        return Decision(
            GIVE_UP,
            f"restart {attempt.restart} was the last that "
            f"VQMOE_MAX_RESTARTS={attempt.max_restarts} allows (state {state}: {reason})",
        )
    if state == "running":
        return Decision(
            REQUEUE, f"the ranks were killed after iteration {start.iteration} -> {now}"
        )
    return Decision(REQUEUE, f"iteration {start.iteration} -> {now}: {reason}")
