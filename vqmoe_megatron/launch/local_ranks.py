"""Start N ranks of this program on this machine and watch over them.

The children get torchrun's variables, and the process id of their starter, whose death they notice.
Stop signals are passed on to all of them, and kept for those that are still starting; when one rank
dies, the others get a short grace and are then killed, because they would wait for it in a
collective.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from types import FrameType

from vqmoe_megatron.runtime.exit_codes import end_in_words

GRACE_SECONDS = 10.0  # for the other ranks to report after one died
POLL_SECONDS = 0.1
TELL_SECONDS = 5.0  # after the first rank stopped on request; the others are then ending too
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STARTER_VARIABLE = "VQMOE_STARTER_PID"


@dataclass(frozen=True)
class RanksEnded:
    """How a group of local ranks ended.

    ``code``: 0 or 75 when all ranks ended so, else that of the first rank that ended otherwise
    (128 + signal for a killed rank, as a shell reports it). ``failure``: who and how, or None.
    ``was_killed``: that rank was ended from outside, so it cannot have reported its own end.
    """

    code: int
    failure: str | None = None
    was_killed: bool = False


def stop_signals_to_handle() -> tuple[signal.Signals, ...]:
    """Return the stop signals without a SIGHUP that is ignored: ``nohup`` wants it to stay so."""
    is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_ignored)


def threads_per_rank(num_ranks: int) -> int:
    """Share this machine's cores among ``num_ranks`` ranks, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)


def run_local_ranks(arguments: list[str], num_ranks: int) -> RanksEnded:
    """Run ``python -m vqmoe_megatron.cli ARGUMENTS`` as ``num_ranks`` ranks and wait for them."""
    environment = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        STARTER_VARIABLE: str(os.getpid()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(num_ranks)))
    command = [sys.executable, "-m", "vqmoe_megatron.cli", *arguments]
    ranks: list[subprocess.Popen] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in stop_signals_to_handle()}
    # Blocked, a signal waits: here until all ranks are there to be told, and in a rank, which
    # inherits the mask, until it can handle one. Otherwise a rank still importing would just die.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        for rank in range(num_ranks):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of their own: a terminal's Ctrl-C then reaches them once, through forward().
            ranks.append(
                subprocess.Popen(command, env={**environment, **variables}, start_new_session=True)
            )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return _wait(ranks)
    finally:
        for rank in ranks:
            _end_session(rank)
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _end_session(rank: subprocess.Popen) -> None:
    """Kill what is left of a rank's session: itself, and helpers that outlived its hard end.

    Data loader workers and Megatron's checkpoint writers can outlive a rank that is killed.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()


def _wait(ranks: list[subprocess.Popen]) -> RanksEnded:
    failed: RanksEnded | None = None
    deadline = float("inf")
    is_running, tell_at = True, float("inf")
    while is_running:
        codes = [rank.poll() for rank in ranks]  # poll all: the first may hang for another's sake
        is_running = None in codes
        # A killed rank first: the others may already have failed for want of it.
        for number, code in sorted(enumerate(codes), key=lambda rank: (rank[1] or 0) >= 0):
            if failed is None and code not in (None, 0, 75):
                failed = _failure(number, code)
                deadline = time.monotonic() + GRACE_SECONDS
                others = "; stopping the others" if is_running else ""
                print(f"{failed.failure}{others}", file=sys.stderr, flush=True)
        if 75 in codes and tell_at == float("inf"):
            tell_at = time.monotonic() + TELL_SECONDS
        if is_running and 0 < tell_at < time.monotonic():
            # One stopped before it could meet the others, who would wait for it.
            tell_at = 0.0
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(signal.SIGTERM)
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
            deadline = float("inf")
        if is_running:
            time.sleep(POLL_SECONDS)
    return failed or RanksEnded(max(rank.returncode for rank in ranks))


def _failure(number: int, code: int) -> RanksEnded:
    reason = f"rank {number} {end_in_words(code)}"
    if code < 0:
        # NCCL's watchdog aborts a rank for the failure of another one, which that one reports.
        return RanksEnded(128 - code, reason, was_killed=-code != signal.SIGABRT)
    return RanksEnded(code, reason)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
