"""What ``benchmarks/same_behaviour`` takes for equal, and what it keeps. Nothing is trained."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "same_behaviour"
sys.path.append(str(FOLDER))

from checkout import Checkout, CheckoutUnusable  # noqa: E402
from differences import Difference, differences  # noqa: E402
from kept_results import KeptResults  # noqa: E402
from report import ROWS_PER_SCENARIO, difference_table  # noqa: E402
from run_files import metric_series  # noqa: E402
from surface import listed_commands  # noqa: E402

PACKAGE = "vqmoe_megatron"
SETUP = f"[options.entry_points]\nconsole_scripts =\n    vqmoe = {PACKAGE}.anywhere:start\n"
PROGRAM = "import sys\ndef start():\n    print(sys.argv)\n    sys.exit(75)\n"


@pytest.fixture(scope="module")
def program():
    """``__main__.py`` of the benchmark, as a module."""
    spec = importlib.util.spec_from_file_location("same_behaviour_main", FOLDER / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A commit with the smallest package that has a command."""
    root = tmp_path / "tree"
    (root / PACKAGE).mkdir(parents=True)
    (root / "recipes").mkdir()
    (root / "recipes" / "one.yaml").write_text("")
    (root / PACKAGE / "__init__.py").write_text("")
    (root / PACKAGE / "anywhere.py").write_text(PROGRAM)
    (root / "setup.cfg").write_text(SETUP)
    (root / ".gitignore").write_text("__pycache__/\n")
    git(root, "init", "-q")
    commit(root)
    return root


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    subprocess.run(["git", "-C", root, *identity, *arguments], check=True)


def commit(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "x")


def checkout_of(root: Path, work: Path) -> Checkout:
    return Checkout(root, Path(sys.executable), work)


def test_equal_observations_have_no_row() -> None:
    seen = {"loss": [1.0, math.nan, None], "text": "a\nb", "tree": {"x": [1, {"y": 2.5}]}}
    assert differences("s", seen, {**seen, "loss": [1.0, math.nan, None]}) == []


@pytest.mark.parametrize(
    ("old", "new"), [(0.0, -0.0), (1, 1.0), (1, True), (0.1 + 0.2, 0.3), (None, math.nan)]
)
def test_values_that_python_or_rounding_calls_equal_are_not(old, new) -> None:
    assert len(differences("s", {"x": old}, {"x": new})) == 1
    assert len(differences("s", {"x": [0, old]}, {"x": [0, new]})) == 1


def test_a_series_tells_where_and_how_much() -> None:
    (row,) = differences("s", {"loss": [4.0, 2.0, 1.0]}, {"loss": [4.0, 1.0, 1.001]})
    assert row == Difference(
        "s", "loss", "2.0", "1.0", "2 of 3 values, first value 2, relative 5.0e-01"
    )


def test_a_series_that_ends_early_differs_at_its_end() -> None:
    (row,) = differences("s", {"loss": [4.0, 2.0]}, {"loss": [4.0]})
    assert (row.old, row.new, row.detail) == ("2.0", "(nothing)", "1 of 2 values, first value 2")


def test_what_only_one_side_has_is_a_row() -> None:
    rows = differences("s", {"gone": 1}, {"came": "x"})
    assert [(r.what, r.old, r.new) for r in rows] == [
        ("gone", "1", "(nothing)"),
        ("came", "(nothing)", "x"),
    ]


def test_texts_and_trees_show_their_first_difference() -> None:
    (text,) = differences("s", {"help": "same\nold line"}, {"help": "same\nnew line"})
    assert (text.old, text.new) == ("old line", "new line") and "first line 2" in text.detail
    (end,) = differences("s", {"help": "same"}, {"help": "same\n"})
    assert end.detail == "at the end"
    (tree,) = differences("s", {"row": {"a": 1, "b": 2, "c": 3}}, {"row": {"a": 1, "b": 5, "c": 4}})
    assert (tree.old, tree.new, tree.detail) == ("2", "5", "at b, and 1 more")


def test_the_table_keeps_its_columns_and_counts_what_it_leaves_out() -> None:
    rows = [Difference("s", f"{n}", "a | b", "two\nlines") for n in range(ROWS_PER_SCENARIO + 3)]
    table = difference_table(rows)
    assert len(table) == 2 + ROWS_PER_SCENARIO + 1
    assert table[2] == "| s | 0 | a \\| b | two lines |  |"
    assert "and 3 more" in table[-1]


def test_times_are_compared_by_their_presence_only(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        '{"iteration": 1, "loss": 9.0, "step_time_ms": 1}\n'
        '{"iteration": 2, "loss": 2.5, "step_time_ms": 7}\n'
        '{"iteration": 3, "loss": 2.0, "step_time_ms": 8, "val/loss": 3.0}\n'
    )
    assert metric_series(metrics, after_iteration=1) == {
        "metric iteration": [2, 3],
        "metric loss": [2.5, 2.0],
        "metric step_time_ms": "2 values",
        "metric val/loss": [None, 3.0],
    }


def test_commands_are_found_in_a_help_text() -> None:
    text = (
        "╭─ Options ─────╮\n│ --help  Show. │\n╰───────────────╯\n"
        "╭─ Commands ────────────────╮\n│ mlflow-sync  Send what    │\n"
        "│              could not go │\n│ plan         Plan a run.  │\n╰───────────────╯\n"
    )
    assert listed_commands(text) == ["mlflow-sync", "plan"]
    assert listed_commands(text.partition("╭─ Commands")[0]) == []


def test_a_checkout_runs_the_entry_point_it_names(folder: Path, tmp_path: Path) -> None:
    checkout = checkout_of(folder, tmp_path / "work")
    ended = checkout.run("plan", "x")
    assert (ended.returncode, ended.stdout) == (75, "['vqmoe', 'plan', 'x']\n")
    assert (checkout.work / "recipes" / "one.yaml").is_file()


def test_a_folder_without_the_command_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckoutUnusable, match="no console script vqmoe"):
        checkout_of(tmp_path / "empty", tmp_path / "work")


def test_a_package_from_elsewhere_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / PACKAGE).rename(folder / "moved")
    with pytest.raises(CheckoutUnusable, match="imports vqmoe_megatron from"):
        checkout_of(folder, tmp_path / "work")


def test_places_and_times_are_no_words_of_a_command(folder: Path, tmp_path: Path) -> None:
    checkout = checkout_of(folder, tmp_path / "work")
    said = f"saved {checkout.work}/a | loss 4.5 | step_time_ms 480.0 | eta 0:01  \n20 states"
    assert checkout.stable(said) == (
        "saved WORK/a | loss 4.5 | step_time_ms TIME | eta TIME\n20 states"
    )


def test_results_are_kept_for_a_code_until_it_changes(folder: Path, tmp_path: Path) -> None:
    def kept(name: str) -> KeptResults:
        return KeptResults(tmp_path / "cache", checkout_of(folder, tmp_path / name), "setting")

    kept("a").keep_observation("curve dual, 1 rank", {"loss": [1.5]})
    (folder / "README.md").write_text("another commit of the same code")
    commit(folder)
    assert kept("b").observation("curve dual, 1 rank") == {"loss": [1.5]}
    (folder / PACKAGE / "__init__.py").write_text("x = 1\n")
    changed = kept("c")
    changed.keep_observation("curve dual, 1 rank", {"loss": [9.0]})
    assert changed.folder is None and changed.observation("curve dual, 1 rank") is None
    commit(folder)
    assert kept("d").observation("curve dual, 1 rank") is None


def test_a_kept_directory_is_whole(folder: Path, tmp_path: Path) -> None:
    kept = KeptResults(tmp_path / "cache", checkout_of(folder, tmp_path / "a"), "setting")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("x")
    (kept.folder / "written.partial").mkdir()  # of a copy that was interrupted
    assert kept.directory("written") is None
    kept.keep_directory("written", tmp_path / "run")
    assert (kept.directory("written") / "file").read_text() == "x"


def test_what_fails_in_both_is_not_equal_and_is_not_kept(program, folder, tmp_path) -> None:
    def breaks(checkout: Checkout) -> dict:
        raise RuntimeError(f"no step in {checkout.work}")

    old, new = checkout_of(folder, tmp_path / "a"), checkout_of(folder, tmp_path / "b")
    kept = KeptResults(tmp_path / "cache", old, "setting")
    rows, summary = program.compare(program.Scenario("run", breaks), old, new, kept)
    assert [(row.what, row.old) for row in rows] == [
        ("works in OLD", "RuntimeError: no step in WORK")
    ]
    assert summary["num_different"] == 1 and kept.observation("run") is None


def test_old_is_observed_once_and_leaves_nothing_behind(program, folder, tmp_path) -> None:
    seen = []

    def observe(checkout: Checkout) -> dict:
        seen.append(checkout)
        assert not (checkout.work / "runs").exists()
        (checkout.work / "runs").mkdir()
        return {"loss": (1.5, 2.5 if checkout is new else 2.0)}

    old, new = checkout_of(folder, tmp_path / "a"), checkout_of(folder, tmp_path / "b")
    kept = KeptResults(tmp_path / "cache", old, "setting")
    for _ in range(2):
        rows, _ = program.compare(program.Scenario("run", observe), old, new, kept)
        assert [(row.old, row.new) for row in rows] == [("2.0", "2.5")]
    assert seen == [old, new, new]
