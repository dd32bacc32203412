"""Which starts in one directory are one MLflow run, and what rank 0 writes into the two logs."""

import json

import pytest
from mlflow import MlflowClient
from small_run import PARITY, TINY

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.rundir.status import read_status
from vqmoe_megatron.track.metrics_log import read_metrics
from vqmoe_megatron.track.mlflow.store import connect
from vqmoe_megatron.train.preflight import check_run
from vqmoe_megatron.train.run_report import Rank0Report

PATIENCE_S = 120.0


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    connect(f"sqlite:///{folder}/mlflow.db")  # the first use takes seconds
    return folder


@pytest.fixture
def start(small_corpus, runs_dir, request):
    """``start(*overrides)``: the report of one attempt in this test's run directory."""
    opened = []

    def open_report(*overrides):
        where = [f"data.path={small_corpus}", f"train.output_dir={runs_dir / request.node.name}"]
        config = load_recipe(PARITY, [*TINY, "tracking.mlflow=true", *where, *overrides])
        opened.append(Rank0Report(check_run(config, 1, "cpu"), 0, None))
        return opened[-1]

    yield open_report
    for report in opened:
        report.console.close()


def test_an_attempt_killed_before_its_first_save_is_the_same_run(start, runs_dir):
    killed = start()
    killed.log({"iteration": 1, "loss": 5.0})
    killed.trackers.finish("requeue", PATIENCE_S)  # what was logged has arrived; no more is known
    run_id = killed.trackers.run_id
    again = start("parallel.expert_model_parallel_size=1", "tracking.run_name=renamed")
    assert again.trackers.run_id == run_id
    again.log({"iteration": 1, "loss": 5.0})
    again.log({"iteration": 2, "loss": 4.0})
    again.finish("completed", 2, "all iterations done")

    client = MlflowClient(f"sqlite:///{runs_dir}/mlflow.db")
    points = client.get_metric_history(run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(1, 5.0), (2, 4.0)]
    tags = client.get_run(run_id).data.tags
    assert tags["attempt"] == "2" and tags["attempt/01/world_size"] == "1"
    assert tags["attempt/02/repeats"].startswith("iterations 1 to 1 are trained again")

    with pytest.raises(ValueError, match="says completed at iteration 2, but .* no checkpoint"):
        start()
    for name in ("status.json", "metrics.jsonl", "system_metrics.jsonl"):
        (again.run_dir.path / name).unlink()
    fresh = start()  # begun anew on purpose
    assert fresh.trackers.run_id != run_id
    fresh.finish("completed", 0, "enough")


def test_another_recipe_in_the_same_directory_is_another_run(start):
    first = start()
    first.trackers.finish("requeue", PATIENCE_S)
    second = start("optimizer.lr=0.002", "optimizer.min_lr=0.0001")
    second.trackers.finish("requeue", PATIENCE_S)
    assert second.trackers.run_id != first.trackers.run_id


@pytest.mark.parametrize(("state", "seen"), [("requeue", "requeue"), ("completed", "running")])
def test_a_run_that_may_be_killed_says_so_before_it_waits_for_mlflow(start, state, seen):
    report = start("tracking.mlflow=false")
    states = []
    report.trackers.finish = lambda state, deadline_s: states.append(
        read_status(report.run_dir.path).state
    )
    report.finish(state, 3, "why")
    assert states == [seen]
    assert read_status(report.run_dir.path).state == state


def test_a_full_disk_does_not_keep_mlflow_from_its_end(start, monkeypatch):
    report = start("tracking.mlflow=false")
    ended = []
    report.trackers.finish = lambda state, deadline_s: ended.append(state)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vqmoe_megatron.train.run_report.write_status", full)
    with pytest.raises(OSError, match="No space left"):  # the last word must be written
        report.finish("requeue", 3, "why")
    assert ended == ["requeue"]


def test_the_machines_load_is_kept_apart_from_what_is_computed(start):
    report = start("tracking.mlflow=false")
    report.system_metrics.take = lambda: {"system/memory_used_bytes": 7.0}
    report.log({"iteration": 3, "loss": 2.0})
    report.system_metrics.take = dict
    report.log({"iteration": 4, "loss": 1.0})
    directory = report.run_dir.path
    records = read_metrics(directory)
    assert [set(record) for record in records] == [{"iteration", "timestamp_ms", "loss"}] * 2
    (load,) = read_metrics(directory / "system_metrics.jsonl")
    expected = {"iteration": 3, "timestamp_ms": records[0]["timestamp_ms"]}
    assert load == {**expected, "system/memory_used_bytes": 7.0}
    report.rolled_back(3, "a bad batch")
    assert [record["iteration"] for record in read_metrics(directory)] == [3]
    report.finish("requeue", 3, "signal")
    assert not (directory / "mlflow.json").exists()
    status = json.loads((directory / "status.json").read_text())
    assert (status["state"], status["iteration"]) == ("requeue", 3)


def test_system_metrics_can_be_switched_off(start):
    report = start("tracking.mlflow=false", "tracking.system_metrics=false")
    report.log({"iteration": 1, "loss": 2.0})
    assert report.system_metrics is None
    assert (report.run_dir.path / "system_metrics.jsonl").read_text() == ""
    report.finish("requeue", 1, "signal")


def test_a_failed_run_keeps_the_cause_that_another_rank_recorded_meanwhile(start):
    report = start("tracking.mlflow=false")
    lost = "rank 0: RuntimeError: Connection closed by peer"
    report.run_dir.record_failure(lost)
    report.trackers.finish = lambda *_: report.run_dir.record_failure("rank 1: KeyError: 'cause'")
    report.finish("failed", 0, lost)
    assert read_status(report.run_dir.path).reason == "rank 1: KeyError: 'cause'"


def test_a_plot_that_fails_does_not_cost_the_state(start, monkeypatch, capsys):
    def no_space(folder):
        raise OSError("no space left on device")

    monkeypatch.setattr("vqmoe_megatron.analysis.plots.draw_run_plots", no_space)
    report = start("tracking.mlflow=false")
    report.finish("requeue", 7, "told to stop")
    status = read_status(report.run_dir.path)
    assert (status.state, status.iteration) == ("requeue", 7)
    assert "plots could not be drawn: OSError: no space left on device" in capsys.readouterr().out


def test_records_that_are_gone_are_told(small_corpus, tmp_path, capsys):
    where = [f"data.path={small_corpus}", f"train.output_dir={tmp_path}", "tracking.mlflow=false"]
    config = load_recipe(PARITY, [*TINY, *where])
    for start, is_told in ((20, True), (0, False)):
        report = Rank0Report(check_run(config, 1, "cpu"), start, None)
        report.console.close()
        shown = "".join(capsys.readouterr().out.split())  # a console wraps lines
        assert ("itholdsnothingofiterations1to20" in shown) is is_told
