"""What MLflow's answers mean; the texts are those of a real server of MLflow 3.17."""

import sqlite3

import pytest
import requests
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, PERMISSION_DENIED, UNAUTHENTICATED
from mlflow_server import MlflowServer
from sqlalchemy.exc import OperationalError

from vqmoe_megatron.track.mlflow.errors import MlflowUnavailable, explained, is_permanent
from vqmoe_megatron.track.mlflow.parent_run import open_parent_run

FAILED = "API request to endpoint /api/2.0/mlflow/x failed with error code"


@pytest.mark.parametrize(
    ("error", "permanent", "part"),
    [
        (
            MlflowException(
                f"{FAILED} 403 != 200. Response body: 'Invalid Host header - possible DNS "
                "rebinding attack detected'",
                PERMISSION_DENIED,
            ),
            False,
            "start it with --allowed-hosts host:5000",
        ),
        (
            MlflowException(f"{FAILED} 403 != 200. Response body: ''", PERMISSION_DENIED),
            False,
            "edit permission",
        ),
        (
            MlflowException(f"{FAILED} 401 != 200. Response body: 'You are not", UNAUTHENTICATED),
            False,
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        ),
        (
            MlflowException(
                "API request failed with exception HTTPConnectionPool: Max retries exceeded: "
                "[Errno 111] Connection refused",
                INTERNAL_ERROR,
            ),
            False,
            "no server listens there",
        ),
        (requests.ReadTimeout("Read timed out. (read timeout=5)"), False, "no answer in time"),
        (OperationalError("INSERT", {}, Exception("database is locked")), False, "locked"),
        (MlflowException.invalid_parameter_value("run was deleted"), True, "deleted"),
        (ImportError("No module named 'mlflow'"), True, "No module"),
        (ValueError("two\nlines"), True, "two lines"),
    ],
)
def test_an_error_is_one_line_with_what_to_do(error, permanent, part):
    text = explained(error, "http://host:5000/path")
    assert is_permanent(error) is permanent
    assert part in text and "\n" not in text


def sql_error(text):
    """As SQLAlchemy words an error of SQLite, and MLflow that one."""
    return MlflowException(str(OperationalError("INSERT INTO t", {}, sqlite3.Error(text))))


def test_a_database_that_is_damaged_or_gone_is_named_with_the_way_on(tmp_path):
    file, uri = tmp_path / "mlflow.db", f"sqlite:///{tmp_path}/mlflow.db"
    read_only = sql_error("attempt to write a readonly database")
    assert explained(read_only, uri).startswith(f"{file} was removed while in use; ")
    file.touch()  # SQLite makes one where it has to open it again
    assert explained(sql_error("no such table: runs"), uri).startswith(f"{file} was removed")
    file.write_bytes(b"no database")
    said = explained(read_only, uri)
    assert said.endswith("attempt to write a readonly database") and "INSERT" not in said
    for text in ("file is not a database", "database disk image is malformed"):
        said = explained(sql_error(text), uri)
        assert said.startswith(f"{file} is damaged") and "move it away" in said
        assert "damaged" not in explained(sql_error(text), "http://host:5000")


@pytest.mark.full
def test_a_server_with_passwords_says_what_it_wants(tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf", reason="basic auth needs `pip install mlflow[auth]`")
    server = MlflowServer(tmp_path)
    try:
        server.start(
            *("--app-name", "basic-auth"),
            MLFLOW_AUTH_ADMIN_PASSWORD="correct-horse-42",
            MLFLOW_FLASK_SERVER_SECRET_KEY="for-this-test",
        )
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another")
        with pytest.raises(MlflowUnavailable, match="401.*MLFLOW_TRACKING_PASSWORD"):
            open_parent_run(server.uri, "exp", "study", {})
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct-horse-42")
        assert len(open_parent_run(server.uri, "exp", "study", {})) == 32
    finally:
        server.kill()
