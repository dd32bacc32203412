"""Weights & Biases offline: its own files hold what the logs hold, and nothing else."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from small_run import PARITY

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.rundir.file_names import METRICS_FILE
from vqmoe_megatron.track.metrics_log import MetricsLog
from vqmoe_megatron.track.tracker import TrackedRun
from vqmoe_megatron.track.wandb import RECORD_FILE, WandbTracker

pytest.importorskip("wandb", reason="wandb is not installed")
BLOCK_BYTES, HEADER_BYTES, CHUNK_HEADER_BYTES = 32768, 7, 7


def records_of(file: Path):
    """The records of a ``.wandb`` file: chunks of blocks, as LevelDB's log has them."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, parts = file.read_bytes(), HEADER_BYTES, b""
    while position + CHUNK_HEADER_BYTES <= len(content):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK_HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + CHUNK_HEADER_BYTES])
        position += CHUNK_HEADER_BYTES
        parts += content[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(run_dir: Path) -> list[dict]:
    """What was logged, of all attempts in their order."""
    found = []
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for record in records_of(file):
            if record.WhichOneof("record_type") == "history":
                found.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                )
    return found


def points(run_dir: Path) -> list[tuple[int, float]]:
    return [(row["iteration"], row["loss"]) for row in history(run_dir) if "loss" in row]


class Attempt:
    """One attempt of a run: its log and its tracker."""

    def __init__(self, run_dir: Path, start: int = 0) -> None:
        run_dir.mkdir(exist_ok=True)
        self.said: list[str] = []
        config = load_recipe(PARITY, ["tracking.experiment=test"])
        self.metrics = MetricsLog(run_dir)
        self.metrics.truncate_after(start)
        run = TrackedRun(run_dir, config, 2, start, start > 0, True, None, self.said.append)
        self.tracker = WandbTracker.open(run)

    def log(self, iteration: int, loss: float) -> None:
        record = {"iteration": iteration, "timestamp_ms": 1e12 + iteration, "loss": loss}
        self.metrics.append(record)
        self.tracker.metrics_logged(record)


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("A_SECRET", "swordfish")


def test_two_attempts_are_one_run_with_all_values(tmp_path):
    run_dir = tmp_path / "run"
    first = Attempt(run_dir)
    first.tracker.log_params({"optimizer.lr": 1e-3})
    first.tracker.set_tags({"user": "someone"})
    for iteration in range(1, 4):
        first.log(iteration, iteration / 3)
    first.tracker.finish("requeue", 60.0)
    run_id = json.loads((run_dir / RECORD_FILE).read_text())["id"]
    second = Attempt(run_dir, start=3)
    second.log(4, 4 / 3)
    second.tracker.finish("completed", 60.0)
    assert first.said == second.said == []
    assert json.loads((run_dir / RECORD_FILE).read_text())["id"] == run_id
    assert points(run_dir) == [(n, n / 3) for n in range(1, 5)]
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    runs = [
        r.run for file in files for r in records_of(file) if r.WhichOneof("record_type") == "run"
    ]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {
        (run_id, "test", "run")
    }
    everything = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert b"swordfish" not in everything
    assert b"optimizer.lr" in everything and b"someone" in everything


def test_what_was_logged_before_is_sent_too(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    MetricsLog(run_dir).append({"iteration": 1, "timestamp_ms": 0, "loss": 1.5})
    attempt = Attempt(run_dir, start=1)
    attempt.log(2, 2.5)
    attempt.tracker.finish("completed", 60.0)
    assert points(run_dir) == [(1, 1.5), (2, 2.5)]


def test_without_an_account_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ValueError, match="W&B knows no account here; run `wandb login`"):
        Attempt(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {METRICS_FILE}
