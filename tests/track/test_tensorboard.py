"""TensorBoard's own reader finds what the logs hold, through resumes, kills and faults."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
from small_run import PARITY

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.rundir.file_names import METRICS_FILE, SYSTEM_METRICS_FILE
from vqmoe_megatron.track.metrics_log import MetricsLog
from vqmoe_megatron.track.tensorboard import FOLDER, POSITION_FILE, TensorBoardTracker
from vqmoe_megatron.track.tracker import TrackedRun

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def read(run_dir: Path):
    """What TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run_dir / FOLDER), size_guidance={"scalars": 0, "images": 0})
    shown.Reload()
    return shown


def points(run_dir: Path, name: str = "loss") -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(run_dir).Scalars(name)]


class Attempt:
    """One attempt of a run: its logs and its tracker."""

    def __init__(self, run_dir: Path, start: int = 0, is_same: bool = True) -> None:
        run_dir.mkdir(exist_ok=True)
        self.said: list[str] = []
        config = load_recipe(PARITY, [])
        self.logs = {
            name: MetricsLog(run_dir, name) for name in (METRICS_FILE, SYSTEM_METRICS_FILE)
        }
        for log in self.logs.values():
            log.truncate_after(start)
        run = TrackedRun(run_dir, config, 2, start, start > 0, is_same, None, self.said.append)
        self.tracker = TensorBoardTracker.open(run)

    def log(self, iteration: int, loss: float, name: str = METRICS_FILE) -> None:
        value = (
            {"loss": loss} if name == METRICS_FILE else {"system/cpu_utilization_percentage": loss}
        )
        record = {"iteration": iteration, "timestamp_ms": 1e12 + iteration, **value}
        self.logs[name].append(record)
        self.tracker.metrics_logged(record)

    def wait_for(self, iteration: int, run_dir: Path) -> None:
        """Until that iteration is on disk."""
        for _ in range(500):
            file = run_dir / FOLDER / POSITION_FILE
            if file.exists() and json.loads(file.read_text())[METRICS_FILE] >= iteration:
                return
            time.sleep(0.01)
        raise AssertionError(f"iteration {iteration} was not written; said {self.said}")


def test_every_value_of_the_logs_is_shown_at_its_step_and_time(tmp_path):
    attempt = Attempt(tmp_path / "run")
    values = [5.5, math.nan, math.inf, 4.25]
    for iteration, loss in enumerate(values, 1):
        attempt.log(iteration, loss)
    attempt.log(2, 50.0, SYSTEM_METRICS_FILE)
    attempt.tracker.log_params({"optimizer.lr": 1e-3})
    attempt.tracker.set_tags({"user": "someone"})
    attempt.tracker.finish("completed", 20.0)
    shown = read(tmp_path / "run")
    found = shown.Scalars("loss")
    assert [event.step for event in found] == [1, 2, 3, 4]
    assert [repr(event.value) for event in found] == [repr(value) for value in values]
    assert [event.wall_time for event in found] == pytest.approx(
        [1e9 + n / 1e3 for n in range(1, 5)]
    )
    assert [event.value for event in shown.Scalars("system/cpu_utilization_percentage")] == [50.0]
    texts = {
        tag: shown.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in ("recipe", "tags")
    }
    assert "| optimizer.lr | 0.001 |" in texts["recipe"] and "user: someone" in texts["tags"]
    assert attempt.said == []


def test_a_plot_is_an_image(tmp_path):
    from matplotlib.figure import Figure

    attempt = Attempt(tmp_path / "run")
    picture = tmp_path / "loss.png"
    Figure(figsize=(2, 1), dpi=50).savefig(picture)
    attempt.log(3, 1.0)
    attempt.tracker.log_artifact(picture, "plots")
    attempt.tracker.log_artifact(tmp_path / "run_config.yaml")
    attempt.tracker.finish("completed", 20.0)
    (image,) = read(tmp_path / "run").Images("plots/loss")
    assert (image.width, image.height) == (100, 50)
    assert image.encoded_image_string == picture.read_bytes()


def test_a_resumed_run_has_every_step_once(tmp_path):
    """The first attempt is killed: 5 and 6 were logged after the checkpoint at 4."""
    run_dir = tmp_path / "run"
    first = Attempt(run_dir)
    for iteration in range(1, 7):
        first.log(iteration, 10.0 + iteration)
    first.wait_for(6, run_dir)
    second = Attempt(run_dir, start=4)
    for iteration in range(5, 9):
        second.log(iteration, 20.0 + iteration)
    second.tracker.finish("completed", 20.0)
    expected = [(n, 10.0 + n) for n in range(1, 5)] + [(n, 20.0 + n) for n in range(5, 9)]
    assert points(run_dir) == expected


def test_what_a_killed_attempt_had_not_written_is_written_by_the_next(tmp_path):
    run_dir = tmp_path / "run"
    first = Attempt(run_dir)
    for iteration in range(1, 4):
        first.log(iteration, 1.0)
    first.wait_for(3, run_dir)
    for iteration in range(4, 7):  # nobody tells the tracker
        first.logs[METRICS_FILE].append({"iteration": iteration, "timestamp_ms": 0, "loss": 2.0})
    second = Attempt(run_dir, start=6)
    second.tracker.finish("requeue", 20.0)
    assert points(run_dir) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_a_run_that_was_not_tracked_here_before_is_written_whole(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    log = MetricsLog(run_dir)
    for iteration in range(1, 4):
        log.append({"iteration": iteration, "loss": float(iteration)})
    attempt = Attempt(run_dir, start=3)
    attempt.log(4, 4.0)
    attempt.tracker.finish("completed", 20.0)
    assert points(run_dir) == [(n, float(n)) for n in range(1, 5)]


def test_another_run_in_the_directory_hides_the_old_one(tmp_path):
    run_dir = tmp_path / "run"
    first = Attempt(run_dir)
    first.log(1, 1.0)
    first.log(2, 1.0)
    first.tracker.finish("failed", 20.0)
    second = Attempt(run_dir, is_same=False)
    second.log(1, 9.0)
    second.tracker.finish("completed", 20.0)
    assert points(run_dir) == [(1, 9.0)]


def test_a_rollback_takes_steps_back(tmp_path):
    run_dir = tmp_path / "run"
    attempt = Attempt(run_dir)
    for iteration in range(1, 6):
        attempt.log(iteration, 1.0)
    attempt.wait_for(5, run_dir)
    attempt.logs[METRICS_FILE].truncate_after(2)
    attempt.tracker.rolled_back(2)
    for iteration in range(3, 5):
        attempt.log(iteration, 7.0)
    attempt.tracker.finish("completed", 20.0)
    assert points(run_dir) == [(1, 1.0), (2, 1.0), (3, 7.0), (4, 7.0)]


def test_a_damaged_position_writes_all_again(tmp_path):
    run_dir = tmp_path / "run"
    first = Attempt(run_dir)
    first.log(1, 1.0)
    first.tracker.finish("requeue", 20.0)
    (run_dir / FOLDER / POSITION_FILE).write_text("{")
    second = Attempt(run_dir, start=1)
    second.log(2, 2.0)
    second.tracker.finish("completed", 20.0)
    assert points(run_dir) == [(1, 1.0), (2, 2.0)]
    assert "vqmoe.json is damaged" in second.said[0]


def test_a_folder_that_cannot_be_written_ends_the_tracker_alone(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / FOLDER).write_text("in the way")
    attempt = Attempt(run_dir)
    attempt.log(1, 1.0)
    attempt.tracker.finish("completed", 20.0)
    (said,) = attempt.said
    assert said.startswith("tensorboard: stops here: ") and "training goes on" in said
    assert (run_dir / FOLDER).read_text() == "in the way"
