"""Without MLflow nothing is sent, and what a later sync needs is in the record."""

from __future__ import annotations

import json
from pathlib import Path

from vqmoe_megatron.config import RunConfig
from vqmoe_megatron.track.mlflow import tracker
from vqmoe_megatron.track.tracker import TrackedRun


def opened(run_dir: Path, said: list[str]):
    run = TrackedRun(run_dir, RunConfig(), 1, 0, False, True, None, said.append)
    return tracker.MlflowTracker.open(run)


def test_tags_attempts_and_the_end_are_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(tracker, "missing", lambda package: f"{package} is not installed")
    said: list[str] = []
    first = opened(tmp_path, said)
    first.checkpoint_saved(tmp_path / "iter_0000010", 10)
    first.finish("requeue", 1.0)
    assert first.run_id is None
    assert said == [
        f"not tracked: mlflow is not installed; `vqmoe mlflow-sync {tmp_path}` sends it later"
    ]
    record = json.loads((tmp_path / "mlflow.json").read_text())
    assert not record["is_completed"] and record["tags"]["iteration"] == "10"
    opened(tmp_path, said).finish("completed", 1.0)
    again = json.loads((tmp_path / "mlflow.json").read_text())
    assert again["is_completed"] and again["num_attempts"] == 2
    assert again["run_key"] == record["run_key"]
    opened(tmp_path, said)  # of a completed run: another one
    assert json.loads((tmp_path / "mlflow.json").read_text())["run_key"] != record["run_key"]
