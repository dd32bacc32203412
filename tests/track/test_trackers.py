"""Several trackers at once: each is told everything, and one that fails costs one message."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from toy_package import PARTS, pretend_installed

from vqmoe_megatron import registry
from vqmoe_megatron.config import RunConfig, TrackingConfig
from vqmoe_megatron.track.tracker import TrackedRun, Tracker
from vqmoe_megatron.track.trackers import LEAST_DEADLINE_S, Trackers

CALLS = [
    ("log_params", {"train.seed": 1}),
    ("set_tags", {"a": 1}),
    ("log_artifact", "x.yaml", None),
    ("metrics_logged", {"iteration": 1, "loss": 2.0}),
    ("rolled_back", 0),
    ("checkpoint_saved", "iter_1", 1),
    ("finish", "completed", 20.0),
]


@pytest.fixture
def open_trackers(monkeypatch, tmp_path):
    """``open_trackers(*names)`` -> (trackers, what was reported)."""

    def open_them(*names):
        said: list[str] = []
        run = TrackedRun(tmp_path, RunConfig(), 2, 0, False, False, None, said.append)
        return Trackers(names, run), said

    pretend_installed(monkeypatch, PARTS | {"tracker.gone": "toy_package:Gone"})
    yield open_them
    registry._installed.cache_clear()


def told(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "toy.jsonl").read_text().splitlines()]


def test_every_call_reaches_every_tracker_though_others_fail(open_trackers, tmp_path):
    trackers, said = open_trackers("broken", "gone", "toy")
    for name, *args in CALLS:
        getattr(trackers, name)(*args)
    opened, *calls, (last, state, deadline_s) = told(tmp_path)
    assert opened == ["open", 0, 2]
    assert calls == [list(call) for call in CALLS[:-1]]
    assert (last, state) == ("finish", "completed") and 19 < deadline_s <= 20
    assert len(said) == 2 and all("training goes on" in line for line in said)
    assert "tracker gone: opening failed: ValueError: entry point tracker.gone = " in said[0]
    assert "tracker broken: log_params failed: RuntimeError: log_params of a broken" in said[1]


def test_the_list_above_is_the_whole_interface():
    calls = {name for name in vars(Tracker) if not name.startswith("_")} - {"open", "run_id"}
    assert calls == {name for name, *_ in CALLS}
    assert all(name in vars(Trackers) for name in calls)


def test_a_tracker_may_leave_everything_out(open_trackers):
    trackers, said = open_trackers()
    idle = Tracker(trackers.run)
    for name, *args in CALLS:
        getattr(idle, name)(*args)
        getattr(trackers, name)(*args)
    assert said == [] and trackers.run_id is None and idle.run_id is None


def test_the_deadline_is_for_all_together(open_trackers, monkeypatch, tmp_path):
    trackers, _ = open_trackers("broken", "toy")
    clock = iter([100.0, 100.0, 130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    trackers.finish("requeue", 20.0)
    monkeypatch.undo()
    assert told(tmp_path)[-1] == ["finish", "requeue", LEAST_DEADLINE_S]


def test_the_recipe_names_trackers_of_the_registry(open_trackers):
    assert TrackingConfig().trackers == ("mlflow",)
    assert TrackingConfig(mlflow=False, also=["toy", "gone"]).trackers == ("toy", "gone")
    assert TrackingConfig(also=["toy"]).trackers == ("mlflow", "toy")
    legal = (
        "tracking.also='aim' is not legal; choose one of mlflow, tensorboard, wandb, toy, broken, "
        "gone"
    )
    with pytest.raises(ValueError, match=legal):
        TrackingConfig(also=["toy", "aim"])
    for twice in (["mlflow"], ["toy", "toy"]):
        with pytest.raises(ValueError, match=f"also={','.join(twice)}: name every tracker once"):
            TrackingConfig(also=twice)
