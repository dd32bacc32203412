"""A real ``vqmoe pretrain`` of several ranks, there to be killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small_run import PARITY, TINY, layout_overrides, start_vqmoe  # noqa: E402

from vqmoe_megatron.checkpoint.folder import find_checkpoint  # noqa: E402
from vqmoe_megatron.rundir.status import read_status  # noqa: E402
from vqmoe_megatron.track.metrics_log import read_metrics  # noqa: E402

OVERRIDES = [
    *TINY,
    "vq.codebook_update=ema",
    "model.hidden_dropout=0.1",
    "model.attention_dropout=0.1",
    "optimizer.use_distributed_optimizer=true",
    "checkpoint.save_interval=4",
]


class KilledRun:
    """One run directory, the command that starts or resumes it, and what hits it."""

    def __init__(
        self, run_dir: Path, corpus: Path, num_ranks: int, layout: dict[str, int], *extra: str
    ) -> None:
        self.dir = run_dir
        self.log = run_dir.with_name(f"{run_dir.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.num_ranks = num_ranks
        self.overrides = [*OVERRIDES, *layout_overrides(layout), *extra]
        self.command = ["pretrain", str(PARITY), "--nproc", str(num_ranks), *self.overrides]
        self.command += [f"data.path={corpus}", f"train.output_dir={run_dir}"]
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start or resume; the log holds this attempt only."""
        self.log.write_text("")
        self.process = start_vqmoe(*self.command, log=self.log)

    def complete(self) -> list[str]:
        """Start and leave alone; return what is wrong with the end."""
        self.start()
        code = self.process.wait(timeout=3600)
        state = read_status(self.dir).state
        return [] if (code, state) == (0, "completed") else [f"ended with {code}, {state}"]

    def ranks(self) -> dict[int, psutil.Process]:
        """The rank processes that run their program by now."""
        found = {}
        try:
            for child in psutil.Process(self.process.pid).children():
                if "RANK" in (environment := child.environ()):
                    found[int(environment["RANK"])] = child
        except psutil.NoSuchProcess:
            return found
        return found

    def processes(self) -> list[psutil.Process]:
        """Every process with this run directory on its command line, orphans and forks too."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            is_zombie = process.info["status"] == psutil.STATUS_ZOMBIE
            if not is_zombie and f"train.output_dir={self.dir}" in (process.info["cmdline"] or ()):
                found.append(process)
        return found

    def is_training(self) -> bool:
        """Whether this attempt has begun; before, metrics.jsonl is that of the one before it."""
        return "parameters on rank 0" in self.log.read_text()

    def last_iteration(self) -> int:
        """The newest logged iteration, 0 when there is none."""
        records = read_metrics(self.dir) if (self.dir / "metrics.jsonl").exists() else []
        return int(records[-1]["iteration"]) if records else 0

    def newest_checkpoint(self) -> int:
        """Iteration of the newest checkpoint, 0 when there is none; ``ValueError``: damaged."""
        folder = find_checkpoint(self.dir)
        return int(folder.name.removeprefix("iter_")) if folder else 0

    def saves_in_progress(self) -> list[Path]:
        """Folders of checkpoints that are not complete."""
        return list((self.dir / "checkpoints").glob("*.incomplete"))

    def end_all(self) -> None:
        """Kill whatever is left."""
        for process in self.processes():
            process.kill()
        if self.process is not None:
            self.process.wait()
