"""What the two tiers leave out and run, and that a session without its axes is no good session."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fast_tier import covering, tiered
from tiers import AXES, FIRST, place

HERE = Path(__file__).resolve().parent
TWO_TESTS = """
import pytest

def test_quick(): pass

@pytest.mark.full
def test_slow(): pass
"""


def session(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    (folder / "setup.cfg").write_text("[tool:pytest]\nmarkers =\n    full: of the full tier\n")
    (folder / "test_two.py").write_text(TWO_TESTS)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "tiers", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )


def test_the_full_tier_runs_everything(tmp_path):
    ended = session(tmp_path, "--full", "test_two.py")
    assert ended.returncode == 0
    assert "test_quick PASSED" in ended.stdout and "test_slow PASSED" in ended.stdout
    assert "left to" not in ended.stdout


@pytest.mark.parametrize("workers", [[], ["-n", "2", "--dist", "loadgroup"]], ids=["one", "two"])
def test_the_fast_tier_leaves_marked_tests_out_and_says_so(tmp_path, workers):
    ended = session(tmp_path, "test_two.py", *workers)
    assert ended.returncode == 0
    assert "test_quick" in ended.stdout and "test_slow" not in ended.stdout
    assert "1 tests are left to the full tier" in ended.stdout


@pytest.mark.parametrize("arguments", [[], ["--full"], ["-n", "2"]], ids=["fast", "full", "two"])
def test_a_whole_session_without_its_axes_fails_by_name(tmp_path, arguments):
    ended = session(tmp_path, *arguments)
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED
    for axis, names in AXES.items():
        for name in names:
            assert any(
                line.startswith(axis) and line.endswith(name) and "NOT PASSED" in line
                for line in ended.stdout.splitlines()
            )


@pytest.mark.parametrize("arguments", [["-k", "quick"], ["test_two.py"], ["-m", "not full"]])
def test_a_session_of_some_tests_is_not_judged(tmp_path, arguments):
    ended = session(tmp_path, *arguments)
    assert ended.returncode == 0 and "NOT PASSED" not in ended.stdout


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one", "two"])
def test_when_its_minutes_are_over_the_full_tier_is_left_out_by_file(tmp_path, workers):
    ended = session(tmp_path, "--full", "--full-minutes", "0", "test_two.py", *workers)
    assert ended.returncode == 0 and "1 passed, 1 skipped" in ended.stdout
    assert re.search(r"too late =+\n +1  test_two.py\n", ended.stdout), ended.stdout
    in_time = session(tmp_path, "--full", "--full-minutes", "5", "test_two.py", *workers)
    assert "2 passed" in in_time.stdout and "too late" not in in_time.stdout


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one", "two"])
def test_a_failure_is_named_when_it_happens(tmp_path, workers):
    (tmp_path / "test_wrong.py").write_text(
        "def test_right(): pass\n\ndef test_wrong(): raise ValueError('of codes')\n"
    )
    for detail in ([], ["-q"]):  # after the name of a test, or in a line of dots
        ended = session(tmp_path, "test_wrong.py", *workers, *detail, *detail)
        (line,) = re.findall(r"^FAILED after \d+ s: .*", ended.stdout, re.MULTILINE)
        assert "test_wrong.py::test_wrong" in line and line.endswith("ValueError: of codes")
        assert ended.stdout.index(line) < ended.stdout.index("= FAILURES =")


GROUPED = """
import pytest

@pytest.fixture
def ranks(): pass

@pytest.mark.parametrize("number", range(4))
def test_plain(number): pass

@pytest.mark.parametrize("number", range(4))
def test_with(number, ranks): pass
"""


def test_one_process_has_all_worlds_of_ranks_and_a_file_is_not_torn(tmp_path):
    files = ("test_first.py", "test_second.py")
    for file in files:
        (tmp_path / file).write_text(GROUPED)
    ended = session(tmp_path, *files, "-n", "2", "--dist", "loadgroup")
    passed = re.findall(r"^\[(gw\d)\].* PASSED (\S+)::(test_\w+)", ended.stdout, re.MULTILINE)
    assert len(passed) == 16, ended.stdout
    workers = {
        of: {worker for worker, file, test in passed if of in (test, (file, test))}
        for of in ("test_with", *((file, "test_plain") for file in files))
    }
    assert all(len(found) == 1 for found in workers.values()), workers


def test_the_tests_of_the_axes_are_in_the_fast_tier():
    files = sorted({name.split("::")[0] for names in AXES.values() for name in names})
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *files],
        cwd=HERE.parent,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert {name for names in AXES.values() for name in names} <= set(listed)


def test_what_would_be_missed_most_comes_first_and_exists():
    names = ["tests/a.py::x", "tests/moe/a.py::x", "tests/train/z.py::x", "tests/trainer/a.py::x"]
    in_turn = ["tests/train/z.py::x", "tests/moe/a.py::x", "tests/a.py::x", "tests/trainer/a.py::x"]
    assert sorted(names, key=place) == in_turn
    assert all((HERE.parent / folder).is_dir() for folder in FIRST)


def test_the_processes_of_make_keep_that_order(tmp_path):
    (words,) = re.findall(r"^WORKERS := -n 2 (.*)$", (HERE.parent / "Makefile").read_text(), re.M)
    (tmp_path / "tests" / "train").mkdir(parents=True)
    (tmp_path / "tests" / "train" / "test_one.py").write_text("def test_one(): pass")
    (tmp_path / "tests" / "test_many.py").write_text(GROUPED.replace("test_plain", "test_many"))
    ended = session(tmp_path, "tests", "-n", "1", *words.split())
    ran = re.findall(r"PASSED \S+::(test_\w+)", ended.stdout)
    assert ran[0] == "test_one" and len(ran) == 9, ended.stdout


@pytest.mark.parametrize("words", [["--full-minutes", "5"], ["--full", "--full-minutes", "nan"]])
def test_minutes_without_the_full_tier_are_refused(tmp_path, words):
    ended = session(tmp_path, "test_two.py", *words)
    assert ended.returncode == pytest.ExitCode.USAGE_ERROR
    assert "a number from 0 on, with --full" in ended.stderr


def test_every_two_values_meet_in_a_covering_set():
    cases = [(a, b, c) for a in "xyz" for b in (1, 2, 3) for c in (True, False)]
    chosen = covering(cases)
    assert len(chosen) < len(cases) and chosen == [case for case in cases if case in chosen]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert {(case[i], case[j]) for case in chosen} == {(case[i], case[j]) for case in cases}
    marks = [len(parameters.marks) for parameters in tiered(cases, chosen)]
    assert marks == [case not in chosen for case in cases]
