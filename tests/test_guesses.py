"""Eight changes, each made as a user's package would: one class or object, one line, nothing else.

Five training steps at EP 2 with each, by the real command. A tracker and a metric of the same
package are trained in tests/train/test_users_package.py, with a quantizer that measures itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import PARITY, ROOT, TINY
from toy_package import PARTS, install

from vqmoe_megatron import registry
from vqmoe_megatron.track.metrics_log import read_metrics

pytestmark = pytest.mark.distributed

STILL_LR = 3.25e-4  # of toy_parts
FIVE_STEPS = [
    *TINY,
    "train.train_iters=5",
    "train.eval_iters=1",
    "train.log_interval=1",
    "optimizer.lr_warmup_iters=1",
    "parallel.expert_model_parallel_size=2",
    "tracking.mlflow=false",
]


def start(*words: str | Path, **environ: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "vqmoe_megatron.cli", *map(str, words)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def train(small_corpus, tmp_path, monkeypatch):  # noqa: ANN001, ANN201
    """Five steps with overrides; the run directory."""
    install(monkeypatch, tmp_path)
    numbers = iter(range(9))

    def run(*overrides: str) -> Path:
        run_dir = tmp_path / f"run_{next(numbers)}"
        where = [f"data.path={small_corpus}", f"train.output_dir={run_dir}"]
        process = start("pretrain", PARITY, "--nproc", "2", *FIVE_STEPS, *where, *overrides)
        said, _ = process.communicate(timeout=180)
        assert process.returncode == 0, said
        return run_dir

    return run


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir) if record["iteration"]]


def test_one_package_brings_a_part_of_every_kind() -> None:
    assert {name.split(".")[0] for name in PARTS} == set(registry.KINDS)


@pytest.mark.full
def test_a_quantizer_a_router_a_schedule_a_task_and_an_engine(train) -> None:  # noqa: ANN001
    """Each by itself changes what it should; all at once train, too."""
    plain = losses(train())
    assert losses(train("vq.quantizer=measured")) == plain  # measures, and moves nothing
    mirrored = losses(train("model.moe_router=mirrored"))
    assert mirrored != plain and len(mirrored) == 5
    still = train("optimizer.lr_decay_style=still")
    assert {r["learning_rate"] for r in read_metrics(still) if r["iteration"]} == {STILL_LR}
    doubled = losses(train("train.task=doubled"))
    assert doubled[0] == pytest.approx(2 * plain[0])
    counted = train("train.engine=counting")
    assert losses(counted) == plain
    for rank in range(2):
        assert (counted / f"steps_{rank}.txt").read_text() == 5 * "step\n"
    parts = dict(part.split(".") for part in PARTS)
    kinds = ("quantizer", "router", "schedule", "task", "engine")
    everything = [f"{registry.KINDS[kind].key}={parts[kind]}" for kind in kinds]
    assert len(losses(train(*everything))) == 5


@pytest.mark.full
def test_a_launch_substrate(train, small_corpus, tmp_path) -> None:  # noqa: ANN001
    """Two processes that only ``toyrun`` has told who they are."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    run_dir = tmp_path / "toyrun"
    ranks = [
        start(
            *("pretrain", PARITY, *FIVE_STEPS),
            *(f"data.path={small_corpus}", f"train.output_dir={run_dir}"),
            TOY_RANK=str(rank),
            TOY_SIZE="2",
            TOY_LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert losses(run_dir) == losses(train())
