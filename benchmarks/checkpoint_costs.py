"""What checkpoints cost: seconds, bytes, memory of a save and a load, and what training notices.

    vqmoe prepare stdlib --out data/stdlib
    python benchmarks/checkpoint_costs.py --json benchmarks/checkpoint_costs.json

A model of about 200 million parameters on two ranks (EP 2, distributed optimizer). All is measured
inside the ranks, on the saver and the training step that a run uses:

1. Steps without a save: what a step takes.
2. A save that training waits for: how long the loop stands still.
3. A save in the background: how long the loop stands still for the call and for publishing, and how
   much longer its steps take while the writers share the cores.
4. A load.

Memory comes from a run of its own, because looking takes time: the proportional set size of ranks
and writer processes together, against what they held before. Peaks between two looks are missed,
except a rank's own, which the kernel keeps.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from gloo_ranks import RankPool  # noqa: E402

from vqmoe_megatron.bench.origin import origin  # noqa: E402

RECIPE = ROOT / "recipes" / "quickstart.yaml"
NUM_RANKS, LAYOUT = 2, {"expert_model_parallel_size": 2}
MODEL = [
    "model.hidden_size=512",
    "model.num_attention_heads=8",
    "model.num_layers=8",
    "model.num_moe_experts=16",
    "model.moe_ffn_hidden_size=1408",
    "model.seq_length=64",
    "vq.num_codes=64",
    "vq.init=uniform",  # no pass over data before the first step
    "optimizer.use_distributed_optimizer=true",
    "train.global_batch_size=2",
    "train.micro_batch_size=1",
    "checkpoint.save_interval=0",
    "checkpoint.keep_last=1",
    "tracking.mlflow=false",
]
ARMS = ("save", "background save", "load")
LOOK_SECONDS = 0.1
MAX_STEPS = 1000  # while one background save goes on


def measure(recipe: str, overrides: list[str], num_steps: int, num_repeats: int) -> dict[str, Any]:
    """Run in every rank; return seconds, bytes, and when (``time.monotonic``) each arm ran."""
    import torch

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.train.preflight import check_run
    from vqmoe_megatron.train.stop_requests import NO_REQUEST, StopRequests
    from vqmoe_megatron.train.trainer import Trainer

    run = check_run(load_recipe(Path(recipe), overrides), torch.distributed.get_world_size(), "cpu")
    trainer = Trainer(run, StopRequests({}))
    iterators = trainer.task.training_iterators(len(trainer.model), 0, 0)

    def timed_step() -> float:
        torch.distributed.barrier()
        started = time.monotonic()
        trainer.engine.step(iterators, NO_REQUEST, False)
        return time.monotonic() - started

    timed_step()  # allocates the optimizer's state
    steps = [timed_step() for _ in range(num_steps)]
    rows = []
    for repeat in range(num_repeats):
        for arm in ARMS:
            _reset_peak()
            torch.distributed.barrier()
            row = {"arm": arm, "repeat": repeat, "rss_before_bytes": _memory("VmRSS")}
            started = time.monotonic()
            if arm == "save":
                row |= _save(trainer, 2 * repeat + 1)
            elif arm == "background save":
                row |= _save_in_background(trainer, 2 * repeat + 2, timed_step, median(steps))
            else:
                row |= _load(trainer)
            row |= {"rss_peak_bytes": _memory("VmHWM"), "began": started, "ended": time.monotonic()}
            rows.append(row)
    return {
        "num_parameters": _num_parameters(trainer.model),
        "checkpoint_bytes": _newest_bytes(run.run_dir.checkpoints),
        "step_seconds": steps,
        "rows": rows,
    }


def _save(trainer: Any, iteration: int) -> dict[str, Any]:
    from dataclasses import replace

    started = time.monotonic()
    trainer.saver.save(replace(trainer.progress, iteration=iteration), in_background=False)
    return {"blocked_seconds": time.monotonic() - started}


def _save_in_background(
    trainer: Any, iteration: int, timed_step: Any, usual_step_seconds: float
) -> dict[str, Any]:
    """Save, then step as the loop does, polling after every step, until it is published."""
    from dataclasses import replace

    began = started = time.monotonic()
    trainer.saver.save(replace(trainer.progress, iteration=iteration), in_background=True)
    call_seconds = time.monotonic() - started
    steps, poll_seconds = [], 0.0
    while trainer.saver.is_writing:
        if len(steps) == MAX_STEPS:
            raise RuntimeError(f"the background save is not done after {MAX_STEPS} steps")
        steps.append(timed_step())
        started = time.monotonic()
        trainer.saver.poll()
        poll_seconds += time.monotonic() - started
    return {
        "blocked_seconds": call_seconds + poll_seconds,
        "call_seconds": call_seconds,
        "poll_seconds": poll_seconds,
        "num_steps_meanwhile": len(steps),
        "extra_step_seconds": sum(steps) - usual_step_seconds * len(steps),
        "until_published_seconds": time.monotonic() - began,
    }


def _load(trainer: Any) -> dict[str, Any]:
    from vqmoe_megatron.checkpoint.folder import find_checkpoint
    from vqmoe_megatron.checkpoint.state import load_checkpoint

    folder = find_checkpoint(trainer.run.run_dir.path)
    started = time.monotonic()
    load_checkpoint(folder, trainer.state, has_same_layout=True)
    return {"blocked_seconds": time.monotonic() - started}


def _reset_peak() -> None:
    """Let the kernel forget this process's peak resident set (Linux, proc(5): clear_refs)."""
    from vqmoe_megatron.runtime.host_memory import release_free_memory

    release_free_memory()
    Path("/proc/self/clear_refs").write_text("5")


def _memory(name: str) -> int:
    """``VmRSS`` or, since the last reset, ``VmHWM`` of this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _num_parameters(model: list[Any]) -> int:
    """Parameters of the whole model: experts of every rank, everything else once."""
    import torch

    parameters = [p for chunk in model for p in chunk.parameters()]
    experts = torch.tensor(sum(p.numel() for p in parameters if not getattr(p, "allreduce", True)))
    torch.distributed.all_reduce(experts)
    return int(experts) + sum(p.numel() for p in parameters if getattr(p, "allreduce", True))


def _newest_bytes(checkpoints: Path) -> int:
    newest = max(checkpoints.glob("iter_*"))
    return sum(file.stat().st_size for file in newest.iterdir())


class MemoryWatch:
    """Looks at the memory of processes and their children from the outside, until closed."""

    def __init__(self, process_ids: list[int]) -> None:
        self._roots = [psutil.Process(number) for number in process_ids]
        self._looks: list[tuple[float, int]] = []  # monotonic seconds, bytes of all together
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._is_over.set()
        self._thread.join()

    def added_bytes(self, began: float, ended: float) -> int:
        """Return the peak within the time over what was held when it began."""
        before = max((look for look in self._looks if look[0] <= began), key=lambda look: look[0])
        return max(size for when, size in self._looks if began <= when <= ended) - before[1]

    def _look_on(self) -> None:
        while not self._is_over.wait(LOOK_SECONDS):
            processes = [p for root in self._roots for p in (root, *root.children(recursive=True))]
            sizes = [_proportional_bytes(process.pid) for process in processes]
            self._looks.append((time.monotonic(), sum(sizes)))


def _proportional_bytes(process_id: int) -> int:
    """Memory of a process, with pages that it shares counted in parts; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def run_ranks(corpus: Path, num_steps: int, num_repeats: int, watches: bool) -> dict[str, Any]:
    """Measure in a fresh world; every figure is that of the slowest or largest rank."""
    pool = RankPool(NUM_RANKS)
    with tempfile.TemporaryDirectory(prefix="vqmoe_checkpoints_") as folder:
        overrides = [*MODEL, f"data.path={corpus.resolve()}", f"train.output_dir={folder}/run"]
        watch = MemoryWatch([rank.pid for rank in pool.ranks]) if watches else None
        try:
            results = pool.run(
                measure,
                str(RECIPE),
                overrides,
                num_steps,
                num_repeats,
                layout=LAYOUT,
                timeout_seconds=3600.0,
            )
        finally:
            if watch is not None:
                watch.close()
            pool.close()
    rows = []
    for of_ranks in zip(*(result["rows"] for result in results), strict=True):
        row = {name: max(r[name] for r in of_ranks) for name in of_ranks[0]}
        row["rss_added_bytes"] = max(r["rss_peak_bytes"] - r["rss_before_bytes"] for r in of_ranks)
        if watch is not None:
            row["all_processes_added_bytes"] = watch.added_bytes(row["began"], row["ended"])
        del row["began"], row["ended"]
        rows.append(row)
    return {**results[0], "rows": rows}


def summary(timed: dict[str, Any], watched: dict[str, Any]) -> dict[str, Any]:
    """Return medians per arm, memory per arm, and background against waiting."""
    arms = {}
    for arm in ARMS:
        rows = [row for row in timed["rows"] if row["arm"] == arm]
        names = [name for name in rows[0] if name.endswith("_seconds")]
        arms[arm] = {name: median(row[name] for row in rows) for name in names}
        seen = [row for row in watched["rows"] if row["arm"] == arm]
        for name in ("rss_before_bytes", "rss_added_bytes", "all_processes_added_bytes"):
            arms[arm][name] = max(row[name] for row in seen)
    background, waited = arms["background save"], arms["save"]["blocked_seconds"]
    lost = background["blocked_seconds"] + background["extra_step_seconds"]
    return {
        "num_parameters": timed["num_parameters"],
        "checkpoint_bytes": timed["checkpoint_bytes"],
        "step_seconds": median(timed["step_seconds"]),
        "arms": arms,
        "background_blocked_share": background["blocked_seconds"] / waited,
        "background_blocked_and_slowdown_share": lost / waited,
    }


def main() -> None:
    """Measure, print, and write the JSON file when asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=ROOT / "data" / "stdlib")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--steps", type=int, default=8, help="without a save")
    parser.add_argument("--repeats", type=int, default=3, help="of every arm")
    arguments = parser.parse_args()
    timed = run_ranks(arguments.corpus, arguments.steps, arguments.repeats, watches=False)
    watched = run_ranks(arguments.corpus, arguments.steps, 1, watches=True)
    result = {
        **origin(),
        "num_ranks": NUM_RANKS,
        "overrides": MODEL,
        **summary(timed, watched),
        "rows": [*timed["rows"], *watched["rows"]],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
