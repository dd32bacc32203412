"""Small training runs for tests: in a rank of a ``RankPool``, or as a ``vqmoe`` command."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from codebook_hashes import codebook_hashes, stream_hashes

ROOT = Path(__file__).resolve().parents[1]
PARITY = ROOT / "recipes" / "parity.yaml"
# Two layers and short samples, for tests that need many steps or many starts.
TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.seq_length=16",
    "train.global_batch_size=4",
    "train.eval_iters=0",
]


def layout_overrides(layout: dict[str, int]) -> list[str]:
    return [f"parallel.{name}={size}" for name, size in layout.items()]


def run_on(pool, corpus: Path, output_dir: Path, overrides: list[str], layout: dict[str, int]):
    """Train on every rank of ``pool``; see :func:`train_here`."""
    every = [f"data.path={corpus}", f"train.output_dir={output_dir}", *overrides]
    every += layout_overrides(layout)
    return pool.run(train_here, str(PARITY), every, layout=layout)


def train_here(recipe: str, overrides: list[str]) -> dict:
    """Train on this rank; return its outcome, records, codebook hashes and parameter hash.

    An error that stops training is returned as ``error``, when all ranks raise it alike.
    """
    import torch

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.train.preflight import check_run
    from vqmoe_megatron.train.run_report import RunReport
    from vqmoe_megatron.train.stop_requests import StopRequests
    from vqmoe_megatron.train.trainer import Trainer

    class Records(RunReport):
        def __init__(self) -> None:
            self.records: list[dict[str, float]] = []
            self.messages: list[str] = []

        def message(self, text: str) -> None:
            self.messages.append(text)

        def rolled_back(self, iteration: int, text: str) -> None:
            self.messages.append(f"rolled back to {iteration}: {text}")

        def log(self, record) -> None:
            self.records.append({name: float(value) for name, value in record.items()})

    config = load_recipe(Path(recipe), overrides)
    run = check_run(config, torch.distributed.get_world_size(), "cpu")
    stop_requests = StopRequests({})
    trainer = Trainer(run, stop_requests)
    trainer.resume()
    report = Records()
    is_first = torch.distributed.get_rank() == 0
    stop_requests.watch(run.run_dir.path, config.train.exit_duration_in_mins, is_first)
    error, state, reason = "", "", ""
    try:
        outcome = trainer.train(report)
        state, reason = outcome.state, outcome.reason
        stop_requests.acknowledge()
    except FloatingPointError as raised:
        error = str(raised)
    return {
        "state": state,
        "reason": reason,
        "error": error,
        "iteration": trainer.progress.iteration,
        "skipped": trainer.progress.skipped_iterations,
        "records": report.records,
        "messages": report.messages,
        "passed_over": trainer.progress.passed_over_samples,
        "codebooks": codebook_hashes(trainer.model),
        "streams": stream_hashes(trainer.model),
        "finite_codebooks": all(
            bool(torch.isfinite(tensor).all())
            for chunk in trainer.model
            for name, tensor in chunk.state_dict().items()
            if ".codebook." in name and torch.is_tensor(tensor)
        ),
    }


def initial_parameters(recipe: str, overrides: list[str]) -> dict[str, tuple]:
    """Return this rank's parameters: name and place -> (tensor, global offset, global shape)."""
    import torch

    from vqmoe_megatron.config.recipe import load_recipe
    from vqmoe_megatron.engines.megatron.layout_independent_init import sharded_tensors
    from vqmoe_megatron.engines.megatron.model import build_model, build_transformer_config
    from vqmoe_megatron.plan.layout import ParallelLayout

    config = load_recipe(Path(recipe), ["model.vocab_size=256", *overrides])
    layout = ParallelLayout.from_config(config, torch.distributed.get_world_size())
    model = build_model(config, build_transformer_config(config, layout), layout)
    return {
        f"{part.key} {list(part.global_offset)}": (
            part.data.clone(),
            list(part.global_offset),
            list(part.global_shape),
        )
        for chunk in model
        for part in sharded_tensors(chunk.module.sharded_state_dict())
        if part.data is not None
    }


def start_vqmoe(*arguments: str, log: Path) -> subprocess.Popen:
    """Start ``vqmoe ARGUMENTS`` with its output appended to ``log``."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "vqmoe_megatron.cli", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
        )


def wait_until(
    condition, process: subprocess.Popen, log: Path, timeout_seconds: float = 90
) -> None:
    """Poll until ``condition()``; fail with the log's end when the process ends first or time is
    up."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            how = f"ended with {process.poll()}" if process.poll() is not None else "takes too long"
            raise AssertionError(f"the process {how}:\n{log.read_text()[-3000:]}")
        time.sleep(0.02)
