"""Two tiers of tests, and the axes that a whole session must have proved.

``pytest`` runs the fast tier, ``pytest --full`` every test. A test marked ``full`` is left to the
second: more cases of what a fast one proves with fewer, or the same at the size of a real run.
``--full-minutes 10`` leaves those out that would begin later, and says how many of which files, so
that a slow machine ends, too; tests of the fast tier all run.

A leg that collects nothing, or skips everything, looks green. So when nothing narrows a session,
the tests of ``AXES``, one or more for each axis of parallelism and each way to lose a run, must
have passed, by name, or the session fails. Its last lines show them.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import pytest

LAYOUTS = "tests/train/test_layouts.py::test_the_curve_is_that_of_one_rank"
EQUALITY = "tests/moe/test_layer_equality.py::test_sharded_experts"
AXES = {
    "TP": [f"{LAYOUTS}[tp2]", f"{EQUALITY}[tp2-one-code-one-expert-code-space]"],
    "PP, VPP": [f"{LAYOUTS}[pp2-vpp2]"],
    "EP": [f"{LAYOUTS}[token-dispatch-ep2]"],
    "ETP": [f"{LAYOUTS}[tp2-ep2-etp2]"],
    "CP": ["tests/train/test_context_parallel.py::test_the_curve_is_that_of_one_rank[cp2-dual]"],
    "DP": ["tests/train/test_layouts.py::test_codebooks_are_bit_equal_on_all_replicas[dp2-ep2]"],
    "distributed optimizer": [f"{LAYOUTS}[dp2-distributed-optimizer]"],
    "stop and resume": [
        "tests/train/test_stopping.py::test_limits_and_the_stop_file[overrides1-requeue-STOP]",
        "tests/checkpoint/test_state.py::test_resuming_is_bitwise_exact[plain]",
    ],
    "reshard": ["tests/train/test_resharding.py::test_a_run_goes_on_at_other_layouts[tp2-pp2-tp1]"],
    "kill -9": [
        "tests/train/test_stopping.py::test_a_kill_at_any_moment_of_a_save_leaves_no_half_checkpoint"
    ],
    "MLflow outage": [
        "tests/track/test_mlflow_outage.py::"
        "test_one_run_without_hole_or_duplicate_through_refusal_outage_and_kill"
    ],
}
FIRST = ("tests/train", "tests/moe", "tests/checkpoint")  # what would be missed most
TOO_LATE = "of the full tier, and its {:g} minutes are over"


def place(nodeid: str) -> int:
    """Of a test's folder among those that run first, or behind them; there tests stay in order."""
    folders = [nodeid.startswith(f"{folder}/") for folder in FIRST]
    return folders.index(True) if any(folders) else len(folders)


class Tiers:
    """Leaves the full tier out unless it is asked for, and judges the session by its axes."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.num_left_out = 0
        self.started = time.monotonic()
        self.too_late: Counter[str] = Counter()  # tests left out for the time, by file
        self.seconds: dict[str, float] = {}  # by the name of each test that passed

    def is_whole(self) -> bool:
        """Whether nothing on the command line narrows the session to some of the tests."""
        option = self.config.option
        narrowed = (
            option.keyword
            or option.markexpr
            or option.collectonly
            or getattr(option, "lf", False)
            or getattr(option, "deselect", None)
            or getattr(option, "ignore", None)
            or getattr(option, "ignore_glob", None)
        )
        root = self.config.rootpath
        everything = {root, *(root / path for path in self.config.getini("testpaths"))}
        invoked_from = self.config.invocation_params.dir
        chosen = {(invoked_from / argument).resolve() for argument in self.config.args}
        return not narrowed and bool(chosen & everything)

    def unproved(self) -> dict[str, list[str]]:
        """The tests that did not pass, by axis."""
        missing = {
            axis: [name for name in names if name not in self.seconds]
            for axis, names in AXES.items()
        }
        return {axis: names for axis, names in missing.items() if names}

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: place(item.nodeid))
        if self.config.pluginmanager.hasplugin("xdist"):
            for item in items:
                group = "ranks" if "ranks" in item.fixturenames else item.nodeid.split("::")[0]
                item.add_marker(pytest.mark.xdist_group(group))
        if self.config.getoption("full"):
            return
        left_out = [item for item in items if item.get_closest_marker("full")]
        self.num_left_out = len(left_out)
        self.config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]

    @pytest.hookimpl(tryfirst=True)  # before its fixtures
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        limit = self.config.getoption("full_minutes")
        if limit is None or not item.get_closest_marker("full"):
            return
        if time.monotonic() - self.started >= 60 * limit:
            pytest.skip(TOO_LATE.format(limit))

    @pytest.hookimpl(trylast=True)  # after the test's own letter
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid.split("@")[0]] = report.duration  # @: xdist's group
        if report.failed:
            self.name_failure(report)
        if report.skipped and TOO_LATE.split("{")[0] in str(report.longrepr):
            self.too_late[report.nodeid.split("::")[0]] += 1

    def name_failure(self, report: pytest.TestReport) -> None:
        """Say at once what failed: a session that is stopped for its time shows no summary."""
        terminal = self.config.pluginmanager.getplugin("terminalreporter")
        if terminal is None or hasattr(self.config, "workeroutput"):
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        said = str(report.longrepr if crash is None else crash.message).strip()
        reason = said.splitlines()[0] if said else report.when
        terminal.ensure_newline()
        if terminal.verbosity <= 0:
            terminal.line("")  # several processes write letters that ensure_newline does not know
        terminal.line(f"FAILED after {report.duration:.0f} s: {report.nodeid}: {reason}")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.num_left_out = getattr(node, "workeroutput", {}).get("num_left_out", 0)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workeroutput"):  # one of several processes judges nothing
            self.config.workeroutput["num_left_out"] = self.num_left_out
            return
        ends_well = session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self.is_whole() and ends_well and self.unproved():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.num_left_out:
            terminalreporter.line(
                f"{self.num_left_out} tests are left to the full tier: make test-full, or --full"
            )
        if self.too_late:
            terminalreporter.section("left out, for they would have begun too late")
            for file, num_tests in sorted(self.too_late.items()):
                terminalreporter.line(f"{num_tests:>5}  {file}")
        if not self.is_whole():
            return
        terminalreporter.section("axes that real ranks proved")
        for axis, names in AXES.items():
            for name in names:
                seconds = self.seconds.get(name)
                word = "NOT PASSED" if seconds is None else f"{seconds:.1f} s"
                terminalreporter.line(f"{axis:<22}{word:>11}  {name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="also the tests marked full: all that there are"
    )
    parser.addoption(
        "--full-minutes",
        type=float,
        help="with --full: leave out the tests marked full that would begin after so many minutes",
    )


def pytest_configure(config: pytest.Config) -> None:
    minutes = config.getoption("full_minutes")
    if minutes is not None and not (config.getoption("full") and minutes >= 0):
        raise pytest.UsageError(f"--full-minutes {minutes:g}: a number from 0 on, with --full")
    config.pluginmanager.register(Tiers(config), "test-tiers")
