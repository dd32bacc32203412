"""The checks of a world, on real ranks: all good, a lying network, a rank that stays away."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from vqmoe_megatron.runtime.preflight_ranks import check_world
from vqmoe_megatron.runtime.world import RankVariables

pytestmark = pytest.mark.distributed

# One rank; its run directory, then what is broken before the check.
RANK = """
import sys, torch
from pathlib import Path
from vqmoe_megatron.runtime.preflight_ranks import check_world
from vqmoe_megatron.runtime.world import discover_rank
exec(sys.argv[2])
report = check_world(discover_rank(), "cpu", Path(sys.argv[1]), wait_seconds=60)
for problem in report.problems:
    print(problem.text, problem.nodes)
sys.stdout.flush()
import os; os._exit(0 if report.is_good else 1)
"""


def two_ranks(run_dirs, breakage=("", "")) -> list[tuple[int, str]]:
    """Start both ranks; (exit code, output) of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(2):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "SLURMD_NODENAME": f"n{rank + 1}",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        command = [sys.executable, "-c", RANK, str(run_dirs[rank]), breakage[rank]]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs, strict=True)]


def test_good_world_leaves_nothing_behind(tmp_path) -> None:
    assert two_ranks([tmp_path / "run"] * 2) == [(0, ""), (0, "")]
    assert list((tmp_path / "run").iterdir()) == []


def test_wrong_sums_and_a_folder_of_its_own_are_found(tmp_path) -> None:
    lie = "real = torch.distributed.all_reduce\n"
    lie += "def wrong(tensor):\n    real(tensor); tensor += 1\n"
    lie += "torch.distributed.all_reduce = wrong"
    (tmp_path / "local").mkdir()
    ended = two_ranks([tmp_path / "shared", tmp_path / "local"], ("", lie))
    assert [code for code, _ in ended] == [1, 1]
    problems = ended[0][1].splitlines()
    assert len(problems) == 3
    assert "not the same folder on n2" in problems[0] and problems[0].endswith("('n2',)")
    assert problems[1] == "rank 1: all-reduce gave 4, not 3 ()"
    assert problems[2] == "collectives fail on some nodes only ('n2',)"


def test_one_rank_is_a_world(tmp_path) -> None:
    try:
        report = check_world(RankVariables(0, 1, 0, "single process"), "cpu", tmp_path)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert report.is_good and report.bad_nodes == () and len(report.facts) == 1
