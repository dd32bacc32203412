"""Real gloo ranks for tests: started once, then handed one function after the other.

A rank is a subprocess with megatron-core adapted to the CPU. ``RankPool`` keeps a world of them, so
that a test pays for its own work and not for imports; ``run_ranks`` is a world for one call.

    def sum_of_ranks(offset):                 # in the test's own file
        total = torch.tensor([torch.distributed.get_rank() + offset])
        torch.distributed.all_reduce(total)
        return total

    results = ranks(4).run(sum_of_ranks, 10, layout={"expert_model_parallel_size": 2})

Arguments and results travel through ``torch.save`` and ``torch.load(weights_only=True)``: tensors,
numbers, strings, and lists, tuples and dicts of them. The function must be a plain function at the
top of its file; the ranks load that file by its path, with this folder on ``sys.path``.

A function that raises, dies or hangs on any rank ends the whole world: its ranks are killed, and
``RanksFailed`` carries the output of the first rank that failed. Output goes to files, never
through pipes, so that no orphan can hold one open.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.005
GRACE_SECONDS = 1.0  # for the other ranks to report their own failure after one died
SHOWN_LINES = 60  # of a failed rank's output
MAX_THREADS = 300  # of a rank; every gloo group that is still held polls in its own


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
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "WORLD_SIZE": str(world_size),
            "CUDA_VISIBLE_DEVICES": "",  # these are CPU tests wherever they run
        }
        self.ranks = []
        for rank in range(world_size):
            with self._output_file(rank).open("w") as output:
                self.ranks.append(
                    subprocess.Popen(
                        [sys.executable, "-u", __file__, str(self.folder)],
                        stdin=subprocess.PIPE,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    )
                )

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
        job = {
            "file": inspect.getfile(function),
            "function": function.__name__,
            "args": args,
            "layout": layout or {},
            "seed": seed,
        }
        torch.save(job, self.folder / f"job_{self.num_jobs}.pt")
        for rank in self.ranks:
            if rank.poll() is None:
                rank.stdin.write(f"{self.num_jobs}\n".encode())
                rank.stdin.flush()
        self._wait(function.__name__, time.monotonic() + timeout_seconds)
        files = [self._result_file(rank) for rank in range(self.world_size)]
        results = [torch.load(file, weights_only=True) for file in files]
        for file in files:
            file.unlink()
        if self._num_threads() > MAX_THREADS:
            self.close()
        return results

    def _num_threads(self) -> int:
        """Of the rank that has most; 0 where the system does not tell."""
        folders = [Path(f"/proc/{rank.pid}/task") for rank in self.ranks]
        return max(len(list(folder.iterdir())) if folder.is_dir() else 0 for folder in folders)

    @property
    def is_closed(self) -> bool:
        """Whether the ranks are gone; a closed pool runs nothing any more."""
        return not self.ranks

    def close(self) -> None:
        """End the ranks, by force after a grace, and remove their files. Repeatable."""
        for rank in self.ranks:
            rank.stdin.close()
        deadline = time.monotonic() + 5.0
        for rank in self.ranks:
            try:
                rank.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                rank.kill()
                rank.wait()
        self.ranks = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self, name: str, deadline: float) -> None:
        while not all(self._result_file(rank).exists() for rank in range(self.world_size)):
            codes = [rank.poll() for rank in self.ranks]
            if any(code is not None for code in codes):
                self._fail(name, f"ended with {[c for c in codes if c is not None][0]}", codes)
            if time.monotonic() > deadline:
                self._fail(name, "did not answer in time", codes)
            time.sleep(POLL_SECONDS)

    def _fail(self, name: str, what: str, codes: list[int | None]) -> None:
        """Kill everything and raise with the output of the first rank to fail, else of all."""
        time.sleep(GRACE_SECONDS)
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# What follows runs in the ranks.


def _serve(folder: Path) -> None:
    """Join the world, then run one job per line of standard input until it ends."""
    from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat
    from vqmoe_megatron.runtime.world import discover_rank, join_world

    install_cpu_compat()
    variables = discover_rank()
    join_world(variables, "cpu")
    current_layout = None
    loaded: dict[str, Any] = {}
    for line in sys.stdin:
        number = int(line)
        job = torch.load(folder / f"job_{number}.pt", weights_only=True)
        print(f"job {number}: {job['function']} {job['layout']}")
        if job["layout"] != current_layout:
            _build_groups(job["layout"])
            current_layout = job["layout"]
        _seed(job["seed"])
        if job["file"] not in loaded:
            loaded[job["file"]] = _load_file(job["file"])
        result = getattr(loaded[job["file"]], job["function"])(*job["args"])
        unfinished = folder / f"unfinished_{variables.rank}.pt"
        torch.save(result, unfinished)
        unfinished.rename(folder / f"result_{number}_{variables.rank}.pt")


def _build_groups(sizes: dict[str, int]) -> None:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker
    from torch.distributed import distributed_c10d

    from vqmoe_megatron.config import ParallelConfig, RunConfig
    from vqmoe_megatron.plan.layout import ParallelLayout
    from vqmoe_megatron.runtime.world import build_process_groups

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()  # forgets the groups, but does not destroy them
        get_moe_layer_wise_logging_tracker().clear()  # holds groups
        gc.collect()  # models hold groups, in cycles
        torch.distributed.barrier()
        for group in list(distributed_c10d._world.pg_map):
            if group is not torch.distributed.group.WORLD:
                # Each group keeps several threads alive: left alone, they add up to thousands.
                torch.distributed.destroy_process_group(group)
    config = RunConfig(parallel=ParallelConfig(**sizes))
    build_process_groups(ParallelLayout.from_config(config, torch.distributed.get_world_size()))


def _seed(seed: int) -> None:
    from megatron.core import tensor_parallel
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    random.seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    torch.manual_seed(seed)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # a job may have set it


def _load_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"ranked_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    try:
        _serve(Path(sys.argv[1]))
        sys.stdout.flush()
        os._exit(0)  # not through gloo's destructors, which wait for the other ranks
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)  # no orderly goodbye: the other ranks may wait in a collective
