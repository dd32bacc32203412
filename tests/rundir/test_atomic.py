"""What is written under a name is whole, on the disk, or not there; nothing else is left behind."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

from vqmoe_megatron.rundir.atomic import name_file, replace_file
from vqmoe_megatron.rundir.own_outputs import said_as_refusal


def full_disk(*arguments) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def steps(monkeypatch) -> list[str]:
    """What reached the disk in which order: ``file`` and ``folder`` flushed, ``name`` given."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        fsync(descriptor)
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")

    def noted_replace(source, target) -> None:
        replace(source, target)
        done.append("name")

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return done


@pytest.mark.parametrize("content", ["two\nlines, \u00fc\n", b"\x00\xff", ""])
def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, steps, content) -> None:
    replace_file(tmp_path / "result", content)
    expected = content.encode() if isinstance(content, str) else content
    assert (tmp_path / "result").read_bytes() == expected
    assert steps == ["file", "name", "folder"]
    assert os.listdir(tmp_path) == ["result"]


def test_a_file_written_elsewhere_is_flushed_and_named(tmp_path, steps) -> None:
    (tmp_path / "part").write_text("new")
    (tmp_path / "result").write_text("old")
    name_file(tmp_path / "part", tmp_path / "result")
    assert (tmp_path / "result").read_text() == "new" and os.listdir(tmp_path) == ["result"]
    assert steps == ["file", "name", "folder"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch, call) -> None:
    path = tmp_path / "result"
    replace_file(path, "old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(ValueError, match="result cannot be written: No space left on device"):
        with said_as_refusal(path):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["result"]


def test_of_several_writers_one_wins_and_none_fails(tmp_path, monkeypatch) -> None:
    """Ranks of several containers or nodes: one process id, one moment."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    contents = [str(number) * 5_000 for number in range(4)]
    begin, failures = threading.Barrier(4), []

    def write(content: str) -> None:
        begin.wait()
        try:
            for _ in range(20):
                replace_file(tmp_path / "result", content)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "result").exists():
            assert (tmp_path / "result").read_text() in contents
    assert failures == [] and os.listdir(tmp_path) == ["result"]
