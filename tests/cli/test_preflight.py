"""``vqmoe preflight``: which question it answers, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from small_run import PARITY
from typer.testing import CliRunner

from vqmoe_megatron.cli import app
from vqmoe_megatron.runtime.node_facts import nodes_of_ranks


def preflight(*arguments: str):
    return CliRunner().invoke(app, ["preflight", *map(str, arguments)])


def test_recipe_is_checked_for_a_world_and_its_directory_printed(small_corpus, tmp_path) -> None:
    run_dir = tmp_path / "run"
    done = preflight(
        PARITY,
        f"data.path={small_corpus}",
        f"train.output_dir={run_dir}",
        "--world-size=4",
        "--print-run-dir",
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [f"{PARITY} is legal on 4 ranks", str(run_dir)]


def test_a_host_that_does_not_exist_is_a_usage_error_at_once(tmp_path) -> None:
    world = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, "-m", "vqmoe_megatron.cli", "preflight", "--run-dir", str(tmp_path)],
        env={**os.environ, **world, "MASTER_ADDR": "[::1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: MASTER_ADDR=[::1 is no host that this machine knows")
    assert len(done.stderr.splitlines()) == 1


def test_recipe_that_does_not_divide_is_refused(small_corpus, tmp_path) -> None:
    done = preflight(
        PARITY,
        f"data.path={small_corpus}",
        f"train.output_dir={tmp_path}",
        "parallel.expert_model_parallel_size=3",
        "--world-size=4",
    )
    assert isinstance(done.exception, ValueError)
    assert "the recipe cannot run on 4 ranks" in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs a RECIPE, or --run-dir"),
        ([PARITY, "--run-dir=x"], "not both"),
        (["--run-dir=x", "--world-size=4"], "--world-size checks a RECIPE"),
        (["--run-dir=x", "--print-run-dir"], "--print-run-dir needs --world-size"),
    ],
)
def test_contradictions(arguments, message) -> None:
    done = preflight(*arguments)
    assert isinstance(done.exception, ValueError) and message in str(done.exception)


@pytest.mark.parametrize(
    ("ranks", "world_size", "nodes", "answer"),
    [
        ({2, 3, 7}, 8, "n1 n2 n3 n4", ("n2", "n4")),
        (set(), 8, "n1 n2", ()),
        ({1}, 8, "", ()),
        ({1}, 9, "n1 n2", ()),
    ],
)
def test_nodes_of_ranks_that_never_came(ranks, world_size, nodes, answer) -> None:
    environ = {"VQMOE_NODES": nodes}
    assert nodes_of_ranks(frozenset(ranks), world_size, environ) == answer
