"""A folder of tables is whole or not there, and never takes the place of something."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vqmoe_megatron.checkpoint.table_folder import write_index, write_table
from vqmoe_megatron.rundir.own_outputs import new_folder


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("start", ["absent", "empty", "link"])
def test_it_appears_whole_at_the_end(start, tmp_path):
    out = tmp_path / "a" / "out"
    if start != "absent":
        (tmp_path / "a" / "real").mkdir(parents=True)
        out = tmp_path / "a" / "real"
    if start == "link":
        out = tmp_path / "link"
        out.symlink_to(tmp_path / "a" / "real")
    with new_folder(out) as partial:
        file = write_table(partial, 7, {"table": torch.arange(6.0).view(2, 3)}, {"k": "v"})
        write_index(partial, {"layers": [1]})
        assert not out.exists() or names(out) == []
    assert names(out) == ["layer_0007.safetensors", "tables.json"]
    assert [entry for entry in names(tmp_path / "a") if "incomplete" in entry] == []
    assert torch.equal(load_file(out / file.name)["table"], torch.arange(6.0).view(2, 3))
    assert file.tensors["table"].num_bytes == 24 and file.tensors["table"].shape == [2, 3]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as partial:
        write_index(partial, {})
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_what_appeared_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="not empty"), new_folder(out) as partial:
        write_index(partial, {"mine": True})
        out.mkdir()
        (out / "theirs").touch()
    assert names(tmp_path) == ["out"] and names(out) == ["theirs"]


@pytest.mark.parametrize("where", ["file", "file/below", "dangling"])
def test_a_place_that_cannot_be_a_folder_is_refused(where, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="in the way|cannot be written"):
        with new_folder(tmp_path / where):
            pass
    assert names(tmp_path) == ["dangling", "file"]


def test_a_full_or_closed_disk_is_a_refusal(tmp_path):
    closed = tmp_path / "gone"
    with pytest.raises(ValueError, match="layer_0001.safetensors cannot be written"):
        write_table(closed, 1, {"table": torch.zeros(1)}, {})
    if os.geteuid() == 0:
        return  # root writes everywhere
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match="Permission denied"), new_folder(tmp_path / "closed/out"):
        pass
