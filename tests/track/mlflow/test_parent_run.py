"""The run above a study's runs, in a real store."""

import pytest
from mlflow import MlflowClient

from vqmoe_megatron.track.mlflow.errors import MlflowUnavailable
from vqmoe_megatron.track.mlflow.parent_run import (
    end_parent_run,
    log_parent_artifacts,
    open_parent_run,
)
from vqmoe_megatron.track.mlflow.record import open_record
from vqmoe_megatron.track.mlflow.store import default_mlflow_uri
from vqmoe_megatron.track.mlflow.tracker import MlflowTracker


def test_a_parent_is_found_again_and_holds_children_and_files(tmp_path):
    uri = default_mlflow_uri(tmp_path / "runs" / "child")
    tags = {"study_dir": "/it's/a \\ path", "rule": "equal tokens"}
    parent = open_parent_run(uri, "exp", "sixty-four", tags)
    assert open_parent_run(uri, "exp", "sixty-four", tags) == parent
    assert open_parent_run(uri, "exp", "sixty-four", {**tags, "rule": "flops"}) != parent
    assert open_parent_run(uri, "exp", "other", tags) != parent

    child_dir = tmp_path / "runs" / "child"
    record = open_record(child_dir, print)
    child = MlflowTracker(None, "exp", None, child_dir, record, parent_run_id=parent)
    child.finish("completed")
    (tmp_path / "report" / "plots").mkdir(parents=True)
    (tmp_path / "report" / "index.html").write_text("<p>")
    (tmp_path / "report" / "plots" / "loss.png").write_bytes(b"png")
    log_parent_artifacts(uri, parent, tmp_path / "report")
    end_parent_run(uri, parent, "FINISHED")

    client = MlflowClient(uri)
    run = client.get_run(parent)
    assert run.info.status == "FINISHED" and run.data.tags["study_dir"] == tags["study_dir"]
    children = client.search_runs(
        [run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )
    assert [found.info.run_id for found in children] == [child.run_id]
    names = {file.path for file in client.list_artifacts(parent)}
    names |= {file.path for file in client.list_artifacts(parent, "plots")}
    assert names == {"index.html", "plots", "plots/loss.png"}
    assert open_parent_run(uri, "exp", "sixty-four", tags) == parent
    assert client.get_run(parent).info.status == "RUNNING"


def test_what_cannot_work_is_one_line(tmp_path):
    with pytest.raises(MlflowUnavailable) as caught:
        open_parent_run("http://127.0.0.1:9", "exp", "study", {"a": 1})
    assert str(caught.value) == (
        "MLflow at http://127.0.0.1:9: connection refused: no server listens there"
    )
    with pytest.raises(ValueError, match="default_mlflow_uri"):
        open_parent_run(None, "exp", "study", {})
    with pytest.raises(ValueError, match="no directory"):
        log_parent_artifacts(f"sqlite:///{tmp_path}/m.db", "0" * 32, tmp_path / "missing")
