"""Every shipped recipe through ``vqmoe plan`` and its search, every study through its commands.

``plan --simulate`` of all recipes is in tests/simulate, their training in tests/training.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from vqmoe_megatron import cli
from vqmoe_megatron.cli import plan as plan_commands
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.plan.layout import minimum_world_size

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "recipes"
STUDIES = sorted(FOLDER.glob("studies/*.yaml"))
RECIPES = [path for path in sorted(FOLDER.rglob("*.yaml")) if path not in STUDIES]
SMOE = "# SMoE baseline: "
SEARCHED_RANKS = 8  # a search tries every layout: seconds per recipe, a minute at 256 ranks

SEARCHED_FIRST = ("quickstart.yaml", "scale/tiny_64.yaml")
IDS = [path.relative_to(FOLDER).as_posix() for path in RECIPES]
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=IDS)
some_recipes = pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=() if name in SEARCHED_FIRST else pytest.mark.full)
        for p, name in zip(RECIPES, IDS, strict=True)
    ],
    ids=IDS,
)
each_study = pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])


@pytest.fixture
def vqmoe(monkeypatch, capsys, tmp_path):
    """Run a command in this process, in a folder with the recipes: code, output, errors."""
    (tmp_path / "recipes").symlink_to(FOLDER)
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vqmoe", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run


def baseline(path: Path) -> list[str]:
    """The overrides of a recipe's plain mixture of experts, where it states them."""
    found = re.search(f"^{SMOE}(.*)$", path.read_text("utf-8"), re.MULTILINE)
    return found[1].split() if found else []


@each_recipe
@pytest.mark.parametrize("hardware", [[], ["--hardware", "CPU"]])
def test_a_recipe_is_planned_in_tables(path: Path, hardware: list[str], vqmoe) -> None:
    code, out, err = vqmoe("plan", path, *hardware)
    assert (code, err) == (0, "")
    assert "predicted step on" in out and "memory of a rank" in out


@each_recipe
def test_a_recipe_and_its_baseline_are_planned_as_json(path: Path, vqmoe) -> None:
    ranks = 4 * minimum_world_size(load_recipe(path, []))
    for overrides in ([], baseline(path)):
        batch = f"train.global_batch_size={ranks * 256 * 11}"
        code, out, err = vqmoe("plan", path, "--world-size", ranks, "--json", batch, *overrides)
        described = json.loads(out)
        assert (code, err, described["errors"]) == (0, "", [])
        assert described["world_size"] == ranks and described["memory_bytes"]


@some_recipes
def test_the_search_of_a_recipe_ends_with_a_verdict(path: Path, vqmoe, monkeypatch) -> None:
    search, found = plan_commands.search_layouts, []

    def once(*arguments):
        found.append(found[0] if found else search(*arguments))
        return found[-1]

    monkeypatch.setattr(plan_commands, "search_layouts", once)
    options = ["--search", "--world-size", SEARCHED_RANKS]
    code, out, err = vqmoe("plan", path, *options)
    assert err == "" and f"of {SEARCHED_RANKS} ranks on" in out
    code_of_json, out, _ = vqmoe("plan", path, *options, "--json")
    described = json.loads(out)["search"]
    assert code == code_of_json == (0 if described["best"] else 2)
    assert described["best"] or any("memory" in reason for reason in described["dropped"])


@each_study
def test_a_study_is_listed_and_told_what_it_would_submit(path: Path, vqmoe) -> None:
    name = path.relative_to(ROOT)
    code, out, err = vqmoe("study", "list", name)
    assert (code, err) == (0, "")
    num_runs = int(re.search(r"(\d+) runs, rule", out)[1])
    assert len(out.splitlines()) >= num_runs > 0
    code, out, err = vqmoe("study", "submit", name, "--dry-run")
    assert code == 0 and f"0-{num_runs - 1}" in out
    code, out, err = vqmoe("study", "status", name)
    assert (code, err) == (0, "") and f"{num_runs} waiting" in out
    code, out, err = vqmoe("study", "report", name)
    assert code == 2 and "has no runs yet" in err
