"""The configuration as flat MLflow parameters."""

import pytest

from vqmoe_megatron.config import ModelConfig, RunConfig
from vqmoe_megatron.tracking.mlflow_store import default_mlflow_uri
from vqmoe_megatron.tracking.run_params import flatten_config, shortened


def test_keys_carry_megatrons_names():
    flat = flatten_config(RunConfig(model=ModelConfig(recompute_modules=["moe", "layernorm"])))
    assert flat["parallel.tensor_model_parallel_size"] == 1
    assert flat["vq.num_codes"] == 64
    assert flat["model.recompute_modules"] == '["moe", "layernorm"]'
    assert flat["tracking.mlflow_uri"] is None
    assert all(not isinstance(value, dict | list) for value in flat.values())


def test_a_mapping_works_and_anything_else_is_refused():
    assert flatten_config({"a": {"b": {"c": 1}}, "d": 2}) == {"a.b.c": 1, "d": 2}
    for wrong in (3, "text", RunConfig):
        with pytest.raises(ValueError, match="dataclass or mapping"):
            flatten_config(wrong)


def test_long_values_are_cut_and_reported():
    notices = []
    assert shortened({"a": "x" * 11, "b": None}, 10, notices.append) == {"a": "x" * 10, "b": "None"}
    assert len(notices) == 1 and "a cut from 11" in notices[0]


def test_the_default_store_lies_beside_the_run_directories(tmp_path):
    assert default_mlflow_uri(tmp_path / "runs" / "a") == f"sqlite:///{tmp_path}/runs/mlflow.db"
