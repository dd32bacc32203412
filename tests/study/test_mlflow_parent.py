"""The parent run of a study whose store changes. Whole studies in a store: test_local_study.py."""

from __future__ import annotations

import json

from vqmoe_megatron.study.mlflow_parent import open_study_parent, parent_override
from vqmoe_megatron.study.study import load_study
from vqmoe_megatron.study.study_task import pretrain_arguments

DOWN = "http://127.0.0.1:9"  # no server listens there


def test_a_parent_in_another_store_is_not_handed_out(write_study) -> None:
    more = ["tracking.mlflow=true", f"tracking.mlflow_uri={DOWN}"]
    study = load_study(write_study(more=more))
    study.start()
    said: list[str] = []

    study.folder.mlflow_parent.write_text(json.dumps({"uri": "sqlite:///x.db", "run_id": "old"}))
    open_study_parent(study, said.append)
    assert said[0].startswith("no MLflow parent run, the study goes on without: MLflow at " + DOWN)
    arguments = pretrain_arguments(study, study.runs[0], is_launched=False)
    assert not any("parent_run_id" in text for text in arguments)
    assert parent_override(study.folder, None) == []

    study.folder.mlflow_parent.write_text(json.dumps({"uri": DOWN, "run_id": "same"}))
    open_study_parent(study, said.append)
    assert said[1].startswith("the MLflow parent run same stays as it was: MLflow at " + DOWN)
    arguments = pretrain_arguments(study, study.runs[0], is_launched=False)
    assert arguments[-1] == "tracking.parent_run_id=same"
