"""The virtual cluster touches only a folder of its own: what is in it goes when it ends."""

from __future__ import annotations

import pytest
from shell_run import ROOT, bash


def own_folder(folder):
    script = f"source '{ROOT}/slurm/cluster/place.sh'; require_own_folder"
    return bash(script, VQMOE_CLUSTER_DIR=str(folder))


def test_new_empty_and_ended_folders_are_taken(tmp_path) -> None:
    assert own_folder(tmp_path / "new").returncode == 0
    assert own_folder(tmp_path).returncode == 0
    (tmp_path / "log").mkdir()  # what down.sh leaves
    assert own_folder(tmp_path).returncode == 0


def test_the_cluster_s_own_folder_is_taken(tmp_path) -> None:
    script = (
        f"source '{ROOT}/slurm/cluster/place.sh'; source '{ROOT}/slurm/cluster/slurm_conf.sh'\n"
        'slurm_conf 4 8 0 17000 >"$conf"; require_own_folder'
    )
    done = bash(script, VQMOE_CLUSTER_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["/tmp/a b", "/tmp/x%n", "relative", "/tmp/it's", "/tmp/ü"])
def test_a_path_that_slurm_conf_cannot_hold_is_refused(folder) -> None:
    done = own_folder(folder)
    assert done.returncode == 2 and f"VQMOE_CLUSTER_DIR={folder} must be an" in done.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("thesis.txt", "is no cluster's and not empty; set it to a new folder"),
        ("slurm.conf", "was not written by up.sh"),
    ],
)
def test_another_folder_is_refused(tmp_path, name, message) -> None:
    (tmp_path / name).write_text("ClusterName=real\n")
    done = own_folder(tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert (tmp_path / name).exists()
