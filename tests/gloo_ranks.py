"""Real gloo ranks for tests: started once, then handed one function after the other.

A rank is a process with megatron-core adapted to the CPU, forked from one that has imported it
(``rank_server``). ``RankPool`` keeps a world of them, so that a test pays for its own work alone;
``run_ranks`` is a world for one call.

    def sum_of_ranks(offset):                 # in the test's own file
        total = torch.tensor([torch.distributed.get_rank() + offset])
        torch.distributed.all_reduce(total)
        return total

    results = ranks(4).run(sum_of_ranks, 10, layout={"expert_model_parallel_size": 2})

Arguments and results travel through ``torch.save`` and ``torch.load(weights_only=True)``: tensors,
numbers, strings, and lists, tuples and dicts of them. The function must be a plain function at the
top of its file; the ranks load that file by its path, with this folder on ``sys.path``.

A function that raises, dies or hangs on any rank ends the whole world: its ranks are killed, and
``RanksFailed`` carries the output of the first rank that failed. Ranks end with the process that
holds their pool, also when that is killed. Output goes to files, never through pipes, so that no
orphan can hold one open. Between two jobs ranks stand still (SIGSTOP).
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import multiprocessing
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
_FOR_ALL_RANKS = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",  # these are CPU tests wherever they run
    "TORCHDYNAMO_DISABLE": "1",  # as install_cpu_compat sets it in a process of its own
}
POLL_SECONDS = 0.005
GRACE_SECONDS = 1.0  # for the other ranks to report their own failure after one died
SHOWN_LINES = 60  # of a failed rank's output
MAX_THREADS = 200  # of a rank; every gloo group that is still held polls in its own
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RanksFailed(Exception):
    """A rank raised, died or did not answer in time; the message shows its output."""


class RankPool:
    """A world of gloo ranks that run functions until closed or until one of them fails."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = Path(tempfile.mkdtemp(prefix=f"vqmoe_ranks_{world_size}_"))
        self.num_jobs = 0
        environment = {
            **os.environ,
            **_FOR_ALL_RANKS,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(world_size),
        }
        context = warm_context()
        self.ranks, self.jobs = [], []
        for rank in range(world_size):
            receiving, sending = context.Pipe(duplex=False)
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (self.folder, self._output_file(rank), own, receiving)
            self.ranks.append(context.Process(target=_rank, args=arguments))
            self.ranks[-1].start()
            receiving.close()
            self.jobs.append(sending)

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        layout: dict[str, int] | None = None,
        seed: int = 1234,
        timeout_seconds: float = 300.0,
    ) -> list[Any]:
        """Call ``function(*args)`` on every rank and return their results in rank order.

        Args:
            function: at the top level of a file.
            args: what ``torch.load(weights_only=True)`` can read.
            layout: Megatron's sizes, such as ``{"expert_model_parallel_size": 2}``; others are 1.
                Experts are never sharded over TP (``expert_tensor_parallel_size`` 1) unless said.
            seed: of every generator on every rank.
            timeout_seconds: after which the world is killed.

        Raises:
            RanksFailed: with the failing rank's output; the pool is then closed.
        """
        self.num_jobs += 1
        self._signal(signal.SIGCONT)
        job = {
            "file": inspect.getfile(function),
            "function": function.__name__,
            "args": args,
            "layout": layout or {},
            "seed": seed,
        }
        torch.save(job, self.folder / f"job_{self.num_jobs}.pt")
        for rank, jobs in zip(self.ranks, self.jobs, strict=True):
            if rank.exitcode is None:
                with contextlib.suppress(BrokenPipeError):  # it died just now: _wait tells
                    jobs.send(self.num_jobs)
        self._wait(function.__name__, time.monotonic() + timeout_seconds)
        self._signal(signal.SIGSTOP)  # gloo's threads poll, a hundred times a second each
        files = [self._result_file(rank) for rank in range(self.world_size)]
        results = [torch.load(file, weights_only=True) for file in files]
        for file in files:
            file.unlink()
        return results

    @property
    def is_worn(self) -> bool:
        """Whether a rank holds so many threads that the next test should get another world."""
        folders = [Path(f"/proc/{rank.pid}/task") for rank in self.ranks]
        return any(
            folder.is_dir() and len(list(folder.iterdir())) > MAX_THREADS for folder in folders
        )

    @property
    def is_closed(self) -> bool:
        """Whether the ranks are gone; a closed pool runs nothing any more."""
        return not self.ranks

    def close(self) -> None:
        """End the ranks, by force after a grace, and remove their files. Repeatable."""
        self._signal(signal.SIGCONT)
        for jobs in self.jobs:
            jobs.close()
        deadline = time.monotonic() + 5.0
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
            if rank.is_alive():
                rank.kill()
                rank.join()
        self.ranks = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _signal(self, number: signal.Signals) -> None:
        """Ranks stand still between two jobs."""
        for rank in self.ranks:
            if rank.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it died just now
                    os.kill(rank.pid, number)

    def _wait(self, name: str, deadline: float) -> None:
        while not all(self._result_file(rank).exists() for rank in range(self.world_size)):
            codes = [rank.exitcode for rank in self.ranks]
            if any(code is not None for code in codes):
                self._fail(name, f"ended with {[c for c in codes if c is not None][0]}", codes)
            if time.monotonic() > deadline:
                self._fail(name, "did not answer in time", codes)
            time.sleep(POLL_SECONDS)

    def _fail(self, name: str, what: str, codes: list[int | None]) -> None:
        """Kill everything and raise with the output of the first rank to fail, else of all."""
        time.sleep(GRACE_SECONDS)
        for rank in self.ranks:
            rank.kill()
            rank.join()
        dead = [rank for rank, code in enumerate(codes) if code is not None]
        shown = dead[:1] or range(self.world_size)
        text = "".join(f"--- rank {rank}\n{self._tail(rank)}\n" for rank in shown)
        self.close()
        who = f"rank {dead[0]}" if dead else "the world"
        raise RanksFailed(f"{name} on {self.world_size} ranks: {who} {what}\n{text}")

    def _tail(self, rank: int) -> str:
        lines = self._output_file(rank).read_text(errors="replace").splitlines()
        return "\n".join(lines[-SHOWN_LINES:])

    def _output_file(self, rank: int) -> Path:
        return self.folder / f"output_{rank}.txt"

    def _result_file(self, rank: int) -> Path:
        return self.folder / f"result_{self.num_jobs}_{rank}.pt"


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    layout: dict[str, int] | None = None,
    seed: int = 1234,
    timeout_seconds: float = 300.0,
) -> list[Any]:
    """Start ``world_size`` ranks for one call of :meth:`RankPool.run`, then end them."""
    pool = RankPool(world_size)
    try:
        return pool.run(function, *args, layout=layout, seed=seed, timeout_seconds=timeout_seconds)
    finally:
        pool.close()


def warm_context() -> ForkServerContext:
    """Ranks are forked from a process of their own, started at first use in its environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_server"])
    before = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "tests"), before.get("PYTHONPATH", "")]
    os.environ.update(_FOR_ALL_RANKS, PYTHONPATH=os.pathsep.join(paths))
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def _rank(folder: Path, output: Path, environment: dict[str, str], jobs: Connection) -> None:
    """The process of a rank, from its fork to its end."""
    multiprocessing.set_start_method(None, force=True)  # what a rank starts, it starts as ever
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with output.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    # The process it was forked from ends with the pool's when no rank holds this; then one that
    # stands still goes on.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)
    ending = threading.Thread(target=_end_with_pool, args=(jobs, folder), daemon=True)
    ending.start()
    try:
        from rank_server import serve

        serve(folder, jobs)
        ending.join()  # the same end was told to it; leaving before it would leave the files
        os._exit(1)  # should it have failed
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # no orderly goodbye: the other ranks may wait in a collective


def _end_with_pool(jobs: Connection, folder: Path) -> None:
    """End this process, whatever it does or waits for, when the one with the pool has closed its
    side of ``jobs`` or is gone, killed perhaps; then nobody else removes the files."""
    gone = select.poll()
    gone.register(jobs.fileno(), 0)  # no event is asked for: a hang-up is always told
    gone.poll()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)  # not through gloo's destructors, which wait for the other ranks


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
