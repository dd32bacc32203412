"""Killing and stopping a real ``vqmoe pretrain --nproc 2``, again and again, until it completes."""

from __future__ import annotations

import os
import random
import signal
import time

import psutil
import pytest
from small_run import PARITY, TINY, layout_overrides, run_on, start_vqmoe, wait_until

from vqmoe_megatron.checkpoint.folder import find_checkpoint
from vqmoe_megatron.rundir.status import read_status
from vqmoe_megatron.track.metrics_log import read_metrics

pytestmark = pytest.mark.distributed

EP2 = {"expert_model_parallel_size": 2}
NUM_ITERS = 240


class Run:
    """One run directory and the command that starts or resumes it."""

    def __init__(self, run_dir, corpus, *overrides: str, num_ranks: int) -> None:
        self.dir = run_dir
        self.log = run_dir.with_suffix(".log")
        self.command = ["pretrain", str(PARITY), "--nproc", str(num_ranks), *TINY, *overrides]
        self.command += [f"data.path={corpus}", f"train.output_dir={run_dir}"]
        self.process = None

    def start(self) -> None:
        self.log.write_text("")
        self.process = start_vqmoe(*self.command, log=self.log)

    def iteration(self) -> int:
        records = read_metrics(self.dir) if (self.dir / "metrics.jsonl").exists() else []
        return max((int(record["iteration"]) for record in records), default=0)

    def has_resumed(self) -> bool:
        return "resumed from" in self.log.read_text()

    def start_and_advance(self) -> list[psutil.Process]:
        """Start, wait for new iterations, and return the rank processes."""
        is_first = not (self.dir / "checkpoints").exists()
        self.start()
        wait_until(lambda: is_first or self.has_resumed(), self.process, self.log)
        before = self.iteration()
        wait_until(lambda: self.iteration() >= before + 3, self.process, self.log)
        return psutil.Process(self.process.pid).children()

    def wait(self) -> int:
        return self.process.wait(timeout=60)


@pytest.fixture
def new_run(tmp_path, small_corpus):
    runs = []

    def new(*overrides: str, num_ranks: int = 2) -> Run:
        runs.append(
            Run(tmp_path / f"run{len(runs)}", small_corpus, *overrides, num_ranks=num_ranks)
        )
        return runs[-1]

    yield new
    for process in (run.process for run in runs if run.process is not None):
        if process.poll() is None:
            for child in psutil.Process(process.pid).children():
                child.kill()
            process.kill()
            process.wait()


def assert_saved(run: Run, state: str, reason: str) -> None:
    status = read_status(run.dir)
    assert status.state == state and reason in status.reason
    if state == "requeue":
        assert find_checkpoint(run.dir).name == f"iter_{status.iteration:07d}"
        assert status.iteration == run.iteration()


@pytest.mark.full
def test_every_way_to_stop_saves_and_the_next_start_goes_on(new_run):
    run = new_run(f"train.train_iters={NUM_ITERS}", *layout_overrides(EP2))

    # 1. SIGTERM to the parent, and more of them during the shutdown
    ranks = run.start_and_advance()
    for _ in range(3):
        run.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert run.wait() == 75
    assert_saved(run, "requeue", "stop signal")
    assert not any(rank.is_running() for rank in ranks)

    # 2. SIGUSR1 to one rank that is not rank 0
    ranks = run.start_and_advance()
    ranks[1].send_signal(signal.SIGUSR1)
    assert run.wait() == 75
    assert_saved(run, "requeue", "stop signal")

    # 3. kill -9 of one rank: a bounded end that names it, and the checkpoint of before
    ranks = run.start_and_advance()
    checkpoint = find_checkpoint(run.dir)
    ranks[1].kill()
    killed = time.monotonic()
    assert run.wait() == 137
    assert time.monotonic() - killed < 30
    assert_saved(run, "failed", "rank 1 was killed by SIGKILL")
    assert "rank 1 was killed by SIGKILL" in run.log.read_text()
    assert not any(rank.is_running() for rank in ranks)
    assert find_checkpoint(run.dir) == checkpoint

    # 4. kill -9 of the parent: its ranks save and end by themselves
    ranks = run.start_and_advance()
    run.process.kill()
    run.process.wait()
    psutil.wait_procs(ranks, timeout=60)
    assert not any(rank.is_running() for rank in ranks)
    assert_saved(run, "requeue", "started the ranks is gone")

    # 5. SIGTERM while the ranks still start
    run.start()
    wait_until(lambda: "local ranks" in run.log.read_text(), run.process, run.log)
    time.sleep(1.0)
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 75
    assert_saved(run, "requeue", "stop signal")

    run.start()
    assert run.process.wait(timeout=300) == 0
    assert_saved(run, "completed", "all iterations done")
    iterations = [record["iteration"] for record in read_metrics(run.dir)]
    assert iterations == list(range(1, NUM_ITERS + 1))
    assert max(len(line) for line in run.log.read_text().splitlines()) < 600
    assert "\x1b" not in run.log.read_text()


def test_a_kill_at_any_moment_of_a_save_leaves_no_half_checkpoint(
    new_run, small_corpus, tmp_path, ranks
):
    overrides = ["train.train_iters=40", "checkpoint.save_interval=1"]
    run = new_run(*overrides, num_ranks=1)
    moments = random.Random(7)
    for _ in range(3):
        run.start()
        before = run.iteration()
        wait_until(lambda before=before: run.iteration() not in (0, before), run.process, run.log)
        time.sleep(moments.uniform(0.0, 0.3))
        os.kill(run.process.pid, signal.SIGKILL)
        run.process.wait()
        folder = find_checkpoint(run.dir)  # raises for one that is not complete
        assert folder is None or (folder / "common.pt").exists()
    run.start()
    assert run.process.wait(timeout=120) == 0
    records = read_metrics(run.dir)
    assert [record["iteration"] for record in records] == list(range(1, 41))
    assert list((run.dir / "checkpoints").glob("*.incomplete")) == []
    # The curve is that of a run that nobody killed, to the last bit.
    whole = run_on(ranks(1), small_corpus, tmp_path / "whole", [*TINY, *overrides], {})[0]
    assert [r["loss"] for r in records] == [r["loss"] for r in whole["records"]]


@pytest.mark.parametrize(
    ("overrides", "state", "reason"),
    [
        (["train.exit_duration_in_mins=0.0"], "requeue", "exit_duration_in_mins"),
        ([], "requeue", "STOP"),
        (["train.exit_interval=2"], "completed", "exit_interval reached at 2 of 6"),
    ],
)
def test_limits_and_the_stop_file(overrides, state, reason, ranks, small_corpus, tmp_path):
    every = [*TINY, "train.train_iters=6"]
    if not overrides:
        (tmp_path / "STOP").touch()
    results = run_on(ranks(2), small_corpus, tmp_path, [*every, *overrides], EP2)
    assert {(result["state"], result["iteration"]) for result in results} == {
        (state, 2 if state == "completed" else 1)
    }
    assert all(reason in result["reason"] for result in results)
    again = run_on(ranks(2), small_corpus, tmp_path, every, EP2)
    assert {(result["state"], result["iteration"]) for result in again} == {("completed", 6)}
