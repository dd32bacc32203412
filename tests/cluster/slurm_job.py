"""One real Slurm job of a small pretraining run: submit it, disturb it, wait for its end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 900.0  # a quiet machine needs a tenth of it
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
NUM_ITERS = 40
# Two layers, short samples, experts spread over the four nodes; a checkpoint every ten iterations.
SMALL_EP4 = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.seq_length=16",
    "parallel.expert_model_parallel_size=4",
    "train.global_batch_size=4",
    "train.eval_iters=0",
    f"train.train_iters={NUM_ITERS}",
    "checkpoint.save_interval=10",
]


def slurm(*command: str) -> str:
    """Run one of Slurm's commands; its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout.strip()


def submit(folder: Path, *arguments: str, **environment: str) -> Job:
    """Call ``slurm/submit.sh`` in ``folder``; the job."""
    done = subprocess.run(
        [str(ROOT / "slurm" / "submit.sh"), "--parsable", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return Job(folder, done.stdout.strip())


def submit_pretraining(
    folder: Path, name: str, corpus: Path, *overrides: str, nodes: str = "-N4", **environment: str
) -> Job:
    """Submit ``slurm/pretrain.sbatch`` with the small recipe; its run is ``folder/name``."""
    job = submit(
        folder,
        nodes,
        f"--job-name={name}",
        str(ROOT / "slurm" / "pretrain.sbatch"),
        str(ROOT / "recipes" / "parity.yaml"),
        f"data.path={corpus}",
        f"train.output_dir={name}",
        *SMALL_EP4,
        *overrides,
        **environment,
    )
    job.run_dir = folder / name
    return job


class Job:
    """A submitted job; ``number`` may be an array task, 12_3."""

    def __init__(self, folder: Path, number: str) -> None:
        self.folder = folder
        self.number = number
        self.run_dir = folder

    @property
    def record(self) -> str:
        return slurm("scontrol", "show", "job", self.number)

    @property
    def state(self) -> str:
        return re.search(r"JobState=([A-Z_]+)", self.record).group(1)

    @property
    def restarts(self) -> int:
        return int(re.search(r"Restarts=(\d+)", self.record).group(1))

    @property
    def minutes_run(self) -> int:
        """Whole minutes since the start of this attempt (of less than a day)."""
        hours, minutes, _ = re.search(r"RunTime=(\d+):(\d+):(\d+)", self.record).groups()
        return int(hours) * 60 + int(minutes)

    @property
    def log(self) -> str:
        path = self.folder / "logs" / "slurm" / f"{self.number}.out"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def rank_log(self, attempt: int, rank: int = 0) -> str:
        folder = self.folder / "logs" / "slurm" / self.number / f"attempt_{attempt}"
        path = folder / f"rank_{rank}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def metrics(self) -> list[dict]:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def status(self) -> dict:
        return json.loads((self.run_dir / "status.json").read_text(encoding="utf-8"))

    def wait_until(self, condition, what: str, seconds: float = END_SECONDS) -> None:
        """Poll; fail with the logs when the job ends first or time is over."""
        deadline = time.monotonic() + seconds
        while not condition():
            state = self.state
            if (state in ENDED and not condition()) or time.monotonic() > deadline:
                raise AssertionError(
                    f"job {self.number} is {state}, not: {what}\n{self.log[-3000:]}\n"
                    f"rank 0:\n{self.rank_log(self.restarts)[-2000:]}"
                )
            time.sleep(0.2)

    def wait_iteration(self, iteration: int) -> None:
        self.wait_until(
            lambda: any(row["iteration"] >= iteration for row in self.metrics()),
            f"at iteration {iteration}",
        )

    def wait_end(self) -> str:
        """Wait until the job is over and not queued again; its state."""
        deadline = time.monotonic() + END_SECONDS
        while (state := self.state) not in ENDED:
            if time.monotonic() > deadline:
                raise AssertionError(f"job {self.number} is still {state}\n{self.log[-3000:]}")
            time.sleep(0.5)
        return state

    def pause_first_rank(self) -> psutil.Process:
        """Stop rank 0's process, and with it the whole run, until Slurm or the test goes on.

        Training must not end by itself while Slurm takes its time to notice something.
        """
        process = self.rank_process(0)
        process.send_signal(signal.SIGSTOP)
        return process

    def rank_process(self, rank: int) -> psutil.Process:
        for process in psutil.process_iter():
            try:
                if process.cmdline()[1:4] != ["-m", "vqmoe_megatron.cli", "pretrain"]:
                    continue
                variables = process.environ()
            except (psutil.Error, OSError):
                continue
            number = variables.get("RANK", variables.get("SLURM_PROCID"))
            if variables.get("SLURM_JOB_ID") == self.number and number == str(rank):
                return process
        raise AssertionError(f"no process of rank {rank} of job {self.number}")
