"""Nothing is replaced but what this program wrote, and what it writes is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vqmoe_megatron.rundir import own_outputs
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.own_outputs import (
    RECORD_FILE,
    is_result_of,
    is_sealed,
    replace_recorded,
    sealed,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != RECORD_FILE}


@pytest.mark.parametrize("text", ["", "one line", "# A\n\nünï\n", sealed("sealed twice\n")])
def test_a_seal_breaks_at_any_change(text):
    content = sealed(text).encode()
    assert is_sealed(content) and content.startswith(text.encode())
    for changed in (b"x" + content, content + b"\n", content.replace(b"sha256", b"SHA256")):
        assert not is_sealed(changed)
    assert not is_sealed(text.encode()) or text.endswith("-->\n")


def test_recorded_files_are_replaced_and_obsolete_ones_removed(tmp_path):
    for _ in range(2):  # what is written again is not obsolete
        replace_recorded(tmp_path, {"a": b"1", "b": b"2"}, ["b"], "we")
        assert (tmp_path / "b").read_bytes() == b"2"
    (tmp_path / "theirs").write_bytes(b"3")
    replace_recorded(tmp_path, {"a": b"4"}, ["b", "theirs"], "we")
    assert contents(tmp_path) == {"a": b"4", "theirs": b"3"}
    assert list(json.loads((tmp_path / RECORD_FILE).read_text())) == ["a"]


@pytest.mark.parametrize(
    "kind", ["never ours", "edited", "a folder", "a dangling link", "no record"]
)
def test_what_is_not_as_we_left_it_is_refused_before_the_first_write(tmp_path, kind):
    replace_recorded(tmp_path, {"b": b"2"} if kind != "not ours" else {}, [], "we")
    if kind == "a folder":
        (tmp_path / "b").unlink()
        (tmp_path / "b").mkdir()
    elif kind == "a dangling link":
        (tmp_path / "b").unlink()
        (tmp_path / "b").symlink_to("nowhere")
    elif kind == "no record":
        (tmp_path / RECORD_FILE).write_text("[]")
    else:
        (tmp_path / "b").write_bytes(b"by hand")
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="is there already, and we did not write it, or it was"):
        replace_recorded(tmp_path, {"a": b"1", "b": b"3"}, [], "we")
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("num_written", range(4))
def test_files_of_a_killed_call_are_known_as_ours(tmp_path, monkeypatch, num_written):
    replace_recorded(tmp_path, {"a": b"1", "b": b"2"}, [], "we")
    written = []

    def until(path, content):
        if len(written) == num_written:
            raise KeyboardInterrupt
        written.append(path)
        replace_file(path, content)

    monkeypatch.setattr(own_outputs, "replace_file", until)
    with pytest.raises(KeyboardInterrupt):
        replace_recorded(tmp_path, {"a": b"3", "b": b"4"}, [], "we")
    monkeypatch.undo()
    replace_recorded(tmp_path, {"a": b"5", "b": b"6"}, [], "we")
    assert contents(tmp_path) == {"a": b"5", "b": b"6"}


@pytest.mark.parametrize(
    ("content", "is_ours"),
    [
        ('{"command": "vqmoe evaluate"}', True),
        ('{"command": "vqmoe finetune"}', False),
        ("{}", False),
        ("[1]", False),
        ("{", False),
        (None, False),  # no file
    ],
)
def test_a_result_says_which_command_it_is_of(tmp_path, content: str | None, is_ours: bool) -> None:
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_text(content)
    assert is_result_of(path, "vqmoe evaluate") == is_ours
