"""Start N ranks of this program on this machine and watch over them.

The children get torchrun's variables. Stop signals are passed on to all of them; when one rank dies,
the others get a short grace and are then killed, because they would wait for it in a collective.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

GRACE_SECONDS = 10.0  # for the other ranks to report after one died
POLL_SECONDS = 0.1
FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def threads_per_rank(num_ranks: int) -> int:
    """Share this machine's cores among ``num_ranks`` ranks, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // num_ranks)


def run_local_ranks(arguments: list[str], num_ranks: int) -> int:
    """Run ``python -m vqmoe_megatron.cli ARGUMENTS`` as ``num_ranks`` ranks.

    Returns:
        0 when all ranks did, else the exit code of the first rank that ended otherwise (128 + signal
        for a killed rank, as a shell reports it).
    """
    environment = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(threads_per_rank(num_ranks)))
    command = [sys.executable, "-m", "vqmoe_megatron.cli", *arguments]
    ranks: list[subprocess.Popen] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        for rank in range(num_ranks):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of their own: a terminal's Ctrl-C then reaches them once, through forward().
            ranks.append(
                subprocess.Popen(command, env={**environment, **variables}, start_new_session=True)
            )
        return _wait(ranks)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen]) -> int:
    failed: int | None = None
    deadline = float("inf")
    while any(rank.poll() is None for rank in ranks):
        for number, rank in enumerate(ranks):
            code = rank.returncode
            if failed is None and code not in (None, 0, 75):
                failed = code if code > 0 else 128 - code
                deadline = time.monotonic() + GRACE_SECONDS
                cause = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
                print(f"rank {number} ended with {cause}; stopping the others", file=sys.stderr)
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
            deadline = float("inf")
        time.sleep(POLL_SECONDS)
    if failed is not None:
        return failed
    codes = [rank.returncode for rank in ranks]
    bad = [code for code in codes if code not in (0, 75)]
    if bad:
        return bad[0] if bad[0] > 0 else 128 - bad[0]
    return max(codes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
