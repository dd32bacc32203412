"""The parent run of a study whose store changes. Whole studies in a store: test_local_study.py."""

from __future__ import annotations

import json

from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.study.mlflow_parent import open_study_parent, parent_override, point_tags
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


def test_a_run_is_tagged_with_its_point(write_study) -> None:
    grid = {"codes": ["4 * experts"], "arm": {"vq": {}, "wide": {"optimizer.lr": 0.1}}}
    more = ["tracking.mlflow=true", "tracking.tags=[team=ours]"]
    study = load_study(write_study(grid=grid, more=more))
    run = study.runs[1]
    config = load_recipe(study.file.recipe, [*run.overrides, *point_tags(run)])
    assert config.tracking.tags == ["team=ours", "point/codes=4 * experts", "point/arm=wide"]
    assert point_tags(run)[0] in pretrain_arguments(study, run, is_launched=False)
