"""Shared fixtures, and the rule that a full test run must really have run its distributed leg.

A leg that collects nothing, or skips everything, looks green. So when a session selects all tests,
at least ``MINIMUM_DISTRIBUTED_TESTS`` tests marked ``distributed`` must have passed, or the session
fails.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for helpers such as gloo_ranks

MINIMUM_DISTRIBUTED_TESTS = 300


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable]:
    """``ranks(world_size)``: a world of gloo ranks, started at first use and kept for the
    session."""
    from gloo_ranks import RankPool

    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools or pools[world_size].is_closed:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory) -> Path:
    """About 300 kB of the interpreter's own library as a byte corpus."""
    from vqmoe_megatron.data.prepare import prepare_corpus

    folder = tmp_path_factory.mktemp("small_corpus")
    source = Path(sysconfig.get_path("stdlib"))
    files = [source / name for name in ("typing.py", "inspect.py", "argparse.py")]
    prepare_corpus("text", folder / "corpus", files, "byte", None, False, False)
    return folder / "corpus"


@pytest.fixture(scope="session")
def stdlib_corpus(tmp_path_factory) -> Path:
    """The interpreter's whole library as a byte corpus, as recipes/parity.yaml is meant to run on.

    Layouts round differently, and a token as near to one code as to another by fp32 rounding may
    then change its code. Here none does; in a small, repetitive text one sometimes does.
    """
    from vqmoe_megatron.data.prepare import prepare_corpus

    out = tmp_path_factory.mktemp("stdlib_corpus") / "corpus"
    prepare_corpus("stdlib", out, [], "byte", None, False, False)
    return out


class DistributedLeg:
    """Counts passed distributed tests and judges the session by them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.num_passed = 0
        self.verdict = ""

    def selects_all(self) -> bool:
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

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and "distributed" in report.keywords:
            self.num_passed += 1

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.selects_all() or self.num_passed >= MINIMUM_DISTRIBUTED_TESTS:
            return
        self.verdict = (
            f"only {self.num_passed} tests marked 'distributed' passed in a session that selected "
            "all "
            f"tests; at least {MINIMUM_DISTRIBUTED_TESTS} must"
        )
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.verdict:
            terminalreporter.section("distributed leg")
            terminalreporter.line(self.verdict)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(DistributedLeg(config), "distributed-leg")
