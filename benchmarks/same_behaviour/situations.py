"""Exit codes and messages, each situation built on the ones before it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkout import SECONDS_PER_COMMAND, Checkout
from run_files import file_names
from training_curves import COMMON, EP, RECIPE

RUN = "runs/situations"
TRAIN = ("pretrain", RECIPE, *COMMON, "data.path=corpus")
HERE = (*TRAIN, f"train.output_dir={RUN}")
UNIQUE = ("started", "ended", "run_key")  # tags of one run
LONG = (*TRAIN, "train.train_iters=5000", "checkpoint.save_interval=2000")


@dataclass(frozen=True)
class Situation:
    """A command, what is done to the work folder before it, and the documented exit code."""

    name: str
    arguments: tuple[str, ...]
    exit_code: int
    before: Callable[[Path], object] = lambda work: None


def _cut_checkpoint(work: Path) -> None:
    shutil.copytree(work / RUN, work / "runs" / "damaged")
    checkpoint = max((work / "runs" / "damaged" / "checkpoints").glob("iter_*"))
    os.truncate(max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size), 1000)


def _lose_tracker(work: Path) -> None:
    shutil.copytree(work / RUN, work / "runs" / "untracked")
    (work / "runs/untracked/checkpoints/latest_checkpointed_iteration.txt").unlink()


def _foreign_folder(work: Path) -> None:
    (work / "foreign").mkdir()
    (work / "foreign" / "mine.txt").write_text("mine")


SITUATIONS = (
    Situation("no command", (), 2),
    Situation("unknown command", ("pretrian",), 2),
    Situation("unknown key", (*HERE, "vq.num_code=8"), 2),
    Situation("value out of range", (*HERE, "vq.ema_decay=1.5"), 2),
    Situation("value of another type", (*HERE, "vq.num_codes=many"), 2),
    Situation("illegal combination", (*HERE, "vq.execution=code_space", "vq.path=continuous"), 2),
    Situation("no override", (*HERE, "vq.num_codes"), 2),
    Situation("missing recipe", ("pretrain", "recipes/nothing.yaml"), 2),
    Situation("missing corpus", (*HERE, "data.path=nowhere"), 2),
    Situation("layout that cannot be", (*HERE, EP, "--nproc", "3"), 2),
    Situation("plan of a layout that cannot be", ("plan", RECIPE, EP, "--world-size", "3"), 2),
    Situation("no ranks", (*HERE, "--nproc", "0"), 2),
    Situation("exit interval", (*HERE, "train.exit_interval=2"), 0),
    Situation(
        "stop file", (*HERE, "--nproc", "1"), 75, lambda work: (work / RUN / "STOP").write_text("")
    ),
    Situation("goes on to the end", HERE, 0),
    Situation("completed again", HERE, 0),
    Situation("records of another run", (*HERE, "vq.num_codes=32"), 2),
    Situation("inspect", ("checkpoint", "inspect", RUN, "--tensors"), 0),
    Situation("inspect nothing", ("checkpoint", "inspect", "runs/nothing"), 2),
    Situation(
        "damaged checkpoint", (*TRAIN, "train.output_dir=runs/damaged"), 2, _cut_checkpoint
    ),
    Situation("lost tracker", (*TRAIN, "train.output_dir=runs/untracked"), 2, _lose_tracker),
    Situation("export", ("export", RUN, "--tables", "tables"), 0),
    Situation("prepare into a foreign folder",
              ("prepare", "text", "--input", "text.txt", "--out", "foreign"), 2, _foreign_folder),
    Situation("sync of no run", ("mlflow-sync", "runs/nothing"), 2),
    Situation("study of no file", ("study", "list", "nothing.yaml"), 2),
    Situation("bench of an unknown arm", ("bench", "wire", "--arms", "Z9"), 2),
)  # fmt: skip


def observe_situations(checkout: Checkout) -> dict[str, Any]:
    """Return exit code and words of every situation, and what the commands left behind."""
    found: dict[str, Any] = {}
    failures = []
    checkout.corpus  # noqa: B018 (prepared when first asked for)
    for situation in SITUATIONS:
        situation.before(checkout.work)
        ended = checkout.run(*situation.arguments)
        found[f"{situation.name}: exit code"] = ended.returncode
        found[f"{situation.name}: says"] = checkout.stable(ended.stdout)
        if ended.returncode != situation.exit_code:
            failures.append(
                f"{situation.name}: exit code {ended.returncode}, documented is "
                f"{situation.exit_code}: {ended.stdout[-300:]}"
            )
    for file in file_names(checkout.work / "tables"):
        found[f"exported {file}"] = _exported(checkout, checkout.work / "tables" / file)
    found["files of a run that was stopped"] = file_names(checkout.work / RUN)
    return {**found, "failures": failures} if failures else found


def observe_signals(checkout: Checkout) -> dict[str, Any]:
    """Return how runs end that get SIGTERM, or lose a rank to SIGKILL."""
    found: dict[str, Any] = {}
    checkout.corpus  # noqa: B018
    for name, sent, num_ranks in (("SIGTERM", signal.SIGTERM, 1), ("SIGKILL", signal.SIGKILL, 2)):
        run_dir = checkout.work / "runs" / name
        overrides = (f"train.output_dir=runs/{name}", "--nproc", str(num_ranks))
        training = subprocess.Popen(
            checkout.command(*LONG, *overrides),
            cwd=checkout.work,
            env=checkout.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for_steps(training, run_dir / "metrics.jsonl")
            os.kill(training.pid if num_ranks == 1 else _children(training.pid)[0], sent)
            found[f"{name}: exit code"] = training.wait(SECONDS_PER_COMMAND)
        finally:
            training.kill()
        status = json.loads((run_dir / "status.json").read_text())
        status["reason"] = re.sub(r"\d+", "N", status["reason"])
        found[f"{name}: status"] = {key: status[key] for key in ("state", "reason")}
    return found


def observe_tracking(checkout: Checkout) -> dict[str, Any]:
    """Return what MLflow's database holds after a run: parameters, tags, how often each metric."""
    three = ("train.exit_interval=3", "tracking.mlflow=true", "train.output_dir=runs/tracked")
    ended = checkout.run(*TRAIN, "data.path=" + checkout.corpus, *three)
    with sqlite3.connect(checkout.work / "runs" / "mlflow.db") as database:
        tables = {
            "param": "SELECT key, value FROM params",
            "tag": "SELECT key, value FROM tags",
            "metric": "SELECT key, count(*) FROM metrics WHERE key NOT LIKE 'system/%' "
            "GROUP BY key",  # the machine's are sampled by time
        }
        found: dict[str, Any] = {
            f"{kind} {key}": "set" if key.endswith(UNIQUE) else checkout.stable(str(value))
            for kind, query in tables.items()
            for key, value in sorted(database.execute(query))
        }
    database.close()
    found["exit code"] = ended.returncode
    return found


def _exported(checkout: Checkout, file: Path) -> str:
    """Return what an exported file says: safetensors writes its header in no order."""
    data = file.read_bytes()
    if file.suffix == ".json":
        return re.sub(r'"sha256": "\w+"', '"sha256"', checkout.stable(data.decode()))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True)
    return f"{header} {hashlib.sha256(data[end:]).hexdigest()[:16]}"


def _wait_for_steps(training: subprocess.Popen, metrics: Path) -> None:
    deadline = time.monotonic() + SECONDS_PER_COMMAND
    while not (metrics.is_file() and metrics.stat().st_size):
        if training.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run made no step; exit code {training.poll()}")
        time.sleep(0.1)


def _children(process_id: int) -> list[int]:
    tasks = Path(f"/proc/{process_id}/task/{process_id}/children").read_text()
    return sorted(int(number) for number in tasks.split())
