"""Any path is a SQLite URI that SQLAlchemy and MLflow read as that path, and no other folder."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy
from mlflow import MlflowClient

from vqmoe_megatron.track.mlflow.sqlite_uri import sqlite_path, sqlite_uri
from vqmoe_megatron.track.mlflow.store import RunRequest, connect, default_mlflow_uri, open_run

NAMES = ["runs", "q?x", "%41", "50%", "%zz", "a#b", "a b", "a&b=c", "+", "ünï-文", "p%20q"]
NAMES += ["it's", 'quo"te', "[x]", "a;b", "back\\slash", "new\nline", "??", "~", "at@h:1"]
NAMES += ["a?b/%41/c#d", "d/e"]


@pytest.mark.parametrize("folder", ["", "/", "/srv/my runs/"])
@pytest.mark.parametrize("name", NAMES)
def test_sqlalchemy_reads_the_path_that_was_meant(folder, name) -> None:
    path = Path(f"{folder}{name}/mlflow.db")
    uri = sqlite_uri(path)
    assert sqlalchemy.make_url(uri).database == str(path)
    assert not sqlalchemy.make_url(uri).query
    assert sqlite_path(uri) == path


def test_an_ordinary_path_stays_as_it_was() -> None:
    """Records of earlier releases hold such URIs."""
    assert sqlite_uri("/a b/ü&c/mlflow.db") == "sqlite:////a b/ü&c/mlflow.db"
    assert sqlite_uri("/a/q?x/b/m.db") == "sqlite:////a/q%3Fx%2Fb%2Fm.db"


@pytest.mark.parametrize("uri", ["http://host/x?y", "postgresql://h/db", "sqlite://", "runs/x.db"])
def test_what_is_no_file(uri) -> None:
    assert sqlite_path(uri) is None


def test_memory_is_no_file_and_options_are_not_the_path() -> None:
    assert sqlite_path("sqlite:///:memory:") is None and sqlite_path("sqlite:///") is None
    assert sqlite_path("sqlite:////a/m.db?timeout=30") == Path("/a/m.db")


def test_a_store_in_an_odd_folder_is_there_with_all_it_holds(tmp_path, monkeypatch) -> None:
    """Everything is below the folder; MLflow makes no second one of a name it did not decode."""
    root = tmp_path / "root"
    run_dir = root / "q?x %41#ü&'s" / "a?b" / "run"
    run_dir.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    uri = default_mlflow_uri(run_dir)
    handle = open_run(uri, RunRequest("exp?", "a run", run_dir, "key"))
    (tmp_path / "note.txt").write_text("a note")
    handle.client.log_artifact(handle.run_id, str(tmp_path / "note.txt"))
    assert [file.path for file in handle.client.list_artifacts(handle.run_id)] == ["note.txt"]
    place = run_dir.parent
    assert {path.name for path in place.iterdir()} == {
        "run",
        "mlflow.db",
        "mlflow.db.lock",
        "mlartifacts",
    }
    assert [path.name for path in root.iterdir()] == ["q?x %41#ü&'s"]
    assert {path.name for path in tmp_path.iterdir()} == {"root", "note.txt"}
    with sqlite3.connect(place / "mlflow.db") as database:
        assert database.execute("select run_uuid from runs").fetchall() == [(handle.run_id,)]
    monkeypatch.chdir(root)  # a relative URI of the same file
    relative = sqlite_uri((place / "mlflow.db").relative_to(root))
    assert MlflowClient(relative).get_run(handle.run_id).info.run_name == "a run"
    assert [path.name for path in root.iterdir()] == ["q?x %41#ü&'s"]


def test_what_is_no_database_is_refused_at_once(tmp_path) -> None:
    (tmp_path / "m.db").mkdir()
    with pytest.raises(IsADirectoryError):
        connect(sqlite_uri(tmp_path / "m.db"))


def test_a_library_that_decodes_nothing_is_told_of(tmp_path, monkeypatch) -> None:
    """SQLAlchemy before 2.1 would make a file of another name."""

    class Url:
        database = "%3F"

    monkeypatch.setattr(sqlalchemy, "make_url", lambda uri: Url)
    with pytest.raises(ValueError, match=r"cannot be told of the file .*upgrade it to 2\.1"):
        connect(sqlite_uri(tmp_path / "?.db"))
    assert list(tmp_path.iterdir()) == []
