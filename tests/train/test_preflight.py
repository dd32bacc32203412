"""Parts of installed packages are loaded and judged before anything is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import PARITY, ROOT
from toy_package import PARTS, install, pretend_installed

from vqmoe_megatron import registry
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.train.preflight import check_parts

CHOSEN = ("router", "schedule", "task", "engine", "tracker")


@pytest.fixture(autouse=True)
def forget_installed():  # noqa: ANN201
    yield
    registry._installed.cache_clear()


@pytest.mark.parametrize("kind", CHOSEN)
def test_a_part_that_a_recipe_names_is_loaded(monkeypatch, kind: str) -> None:  # noqa: ANN001
    pretend_installed(monkeypatch, {f"{kind}.mine": "json:loads"})
    value = "[mine]" if kind == "tracker" else "mine"
    config = load_recipe(PARITY, [f"{registry.KINDS[kind].key}={value}"])
    with pytest.raises(ValueError, match=f"entry point {kind}.mine = json:loads .* a function"):
        check_parts(config, "cpu")
    check_parts(load_recipe(PARITY, []), "cpu")  # one that no recipe names hinders nobody


def test_a_wrong_part_is_refused_before_the_run_directory_is_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(PARTS, "task.wrong", "json:loads")
    install(monkeypatch, tmp_path)
    run_dir = tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-m", "vqmoe_megatron.cli", "pretrain", PARITY, "--nproc", "1"]
        + ["train.task=wrong", f"train.output_dir={run_dir}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2 and "error: entry point task.wrong = json:loads" in ended.stderr
    assert not run_dir.exists()
