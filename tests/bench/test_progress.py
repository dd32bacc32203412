"""Progress stays off standard output: lines in a log, one live line on a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.rundir import waiting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):  # noqa: ANN001, ANN201
    """Seconds that only the test moves."""
    now = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_after_some_seconds_and_then_now_and_again(clock, capsys) -> None:  # noqa: ANN001
    with Progress() as progress:
        for second in range(64):
            clock[0] = float(second)
            progress.stage = "case 1 of 2, "
            progress.look(f"round {second}")
        progress.say("the result")
    shown = capsys.readouterr()
    assert shown.out == "the result\n"
    assert shown.err.splitlines() == [
        "case 1 of 2, round 3 (3 s so far)",
        "case 1 of 2, round 33 (33 s so far)",
        "case 1 of 2, round 63 (63 s so far)",
    ]


def test_a_terminal_gets_one_line_that_is_wiped(monkeypatch, capsys) -> None:  # noqa: ANN001
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Progress() as progress:
        progress.look("round 1")
        before = len(terminal.getvalue())
        progress.say("the result")
        assert terminal.getvalue()[before:].rstrip("\x1b[?25hl").endswith("\x1b[2K")  # wiped before
        progress.show("round 2")
    assert capsys.readouterr().out == "the result\n"
    drawn = terminal.getvalue()
    assert "round 1 (0 s so far)" in drawn and "round 2" in drawn
    assert drawn.rindex("\x1b[2K") > drawn.rindex("round 2")
    assert drawn.endswith("\x1b[?25h") or drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


def test_a_failure_restores_the_terminal(monkeypatch) -> None:  # noqa: ANN001
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with pytest.raises(KeyError), Progress() as progress:
        progress.look("round 1")
        raise KeyError
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")
