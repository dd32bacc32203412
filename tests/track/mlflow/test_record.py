"""mlflow.json: read back whole, replaced whole, never in the way."""

import json

from vqmoe_megatron.track.mlflow.record import open_record


def test_everything_comes_back(tmp_path):
    record = open_record(tmp_path, print)
    key = record.run_key
    assert record.begin_attempt() == 1
    record.note_run("http://host:5000/", "abc")
    record.note_tags({"a": "1", "b": "2"})
    record.note_tags({"b": "3"})
    record.note_completed()
    again = open_record(tmp_path, print)
    assert (again.run_key, again.num_attempts, again.is_completed) == (key, 1, True)
    assert again.known_run("http://host:5000") == "abc" and again.known_run("other") is None
    assert again.tags == {"a": "1", "b": "3"}
    assert again.begin_attempt() == 2 and not again.is_completed
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.json"]
    again.forget()
    fresh = open_record(tmp_path, print)
    assert fresh.run_key != key and fresh.num_attempts == 0
    assert fresh.tags == {} and fresh.known_run("http://host:5000") is None


def test_a_damaged_or_unwritable_file_is_reported_and_no_more(tmp_path):
    said = []
    for text in ("{", "[]", json.dumps({"run_key": "x"})):
        (tmp_path / "mlflow.json").write_text(text)
        assert open_record(tmp_path, said.append).num_attempts == 0
    assert len(said) == 3 and all("is damaged" in notice for notice in said)
    (tmp_path / "file").write_text("")
    assert open_record(tmp_path / "file" / "run", said.append).begin_attempt() == 1
    assert "cannot be written" in said[-1]
