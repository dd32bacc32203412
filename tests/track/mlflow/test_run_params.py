"""Parameters within MLflow's limits, and where they go by default."""

from vqmoe_megatron.track.mlflow.run_params import shortened
from vqmoe_megatron.track.mlflow.store import default_mlflow_uri


def test_long_values_are_cut_and_reported():
    notices = []
    assert shortened({"a": "x" * 11, "b": None}, 10, notices.append) == {"a": "x" * 10, "b": "None"}
    assert len(notices) == 1 and "a cut from 11" in notices[0]


def test_the_default_store_lies_beside_the_run_directories(tmp_path):
    assert default_mlflow_uri(tmp_path / "runs" / "a") == f"sqlite:///{tmp_path}/runs/mlflow.db"
