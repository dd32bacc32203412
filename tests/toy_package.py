"""A package of a user's, with parts of several kinds; imported by name, since this folder is on the
path of tests and of what they start."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from vqmoe_megatron import registry
from vqmoe_megatron.metrics.metric import LayerMetric, Metric
from vqmoe_megatron.track.tracker import TrackedRun, Tracker
from vqmoe_megatron.vq.quantizers.euclidean import Euclidean

GINI = LayerMetric("toy/usage_gini", "inequality of code usage", "1", console_format=".3f")
TAKEN = Metric("loss", "another's name", "1", "none")
ALIKE = LayerMetric("mine/dead_codes", "a scalar of another row", "1")

PARTS = {
    "engine.counting": "toy_parts:CountingEngine",
    "metric.usage_gini": "toy_package:GINI",
    "quantizer.measured": "toy_package:Measured",
    "router.mirrored": "toy_parts:MirroredRouter",
    "schedule.still": "toy_parts:StillSchedule",
    "substrate.toyrun": "toy_launch:Toyrun",
    "task.doubled": "toy_parts:Doubled",
    "tracker.toy": "toy_package:ToyTracker",
    "tracker.broken": "toy_package:BrokenTracker",
}


class Measured(Euclidean):
    """euclidean, with one more scalar of each step."""

    def usage_scalars(self, count: torch.Tensor) -> dict[str, torch.Tensor]:
        """Also the Gini coefficient of ``[C, K]`` tokens per code, mean over slices."""
        num_codes = count.shape[1]
        rank = torch.arange(1, num_codes + 1, device=count.device)
        total = count.sum(dim=1).clamp(min=1.0)
        weighted = (count.sort(dim=1).values * rank).sum(dim=1) / total
        gini = (2 * weighted - num_codes - 1) / num_codes
        return super().usage_scalars(count) | {"usage_gini": gini.mean()}


class ToyTracker(Tracker):
    """Writes down every call as a line of ``toy.jsonl``."""

    def __init__(self, run: TrackedRun) -> None:
        super().__init__(run)
        self.write("open", run.start_iteration, run.world_size)

    def write(self, *call: object) -> None:
        with (self.run.run_dir / "toy.jsonl").open("a") as file:
            file.write(json.dumps(call, default=str) + "\n")


class BrokenTracker(Tracker):
    """Raises in every call but ``open``."""


def _calls() -> list[str]:
    return [name for name in vars(Tracker) if name[0] != "_" and name not in ("open", "run_id")]


def _writing(name: str):  # noqa: ANN202
    return lambda self, *args: self.write(name, *args)


def _raising(name: str):  # noqa: ANN202
    def call(self, *args):  # noqa: ANN001, ANN002, ANN202
        raise RuntimeError(f"{name} of a broken tracker")

    return call


for _name in _calls():
    setattr(ToyTracker, _name, _writing(_name))
    setattr(BrokenTracker, _name, _raising(_name))


def pretend_installed(monkeypatch: pytest.MonkeyPatch, points: dict[str, str]) -> None:
    """As if a package with these entry points (KIND.NAME -> target) were installed."""
    found = [registry.importlib.metadata.EntryPoint(*p, registry.GROUP) for p in points.items()]
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: found)
    registry._installed.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Install it for processes that this one starts: real metadata on their path."""
    metadata = folder / "toy_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    lines = [f"{name} = {target}" for name, target in PARTS.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines, ""]))
    places = [str(folder), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
