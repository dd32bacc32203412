"""The console of tables: plain and wide in a log, coloured on a terminal."""

from __future__ import annotations

import io

from rich.table import Table

from vqmoe_megatron.runtime.table_console import table_console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> str:
    table = Table("[path]", box=None)
    table.add_row("x" * 200)
    console = table_console(stream)
    console.print(table)
    console.print("done", style="red")
    return stream.getvalue()


def test_a_log_is_plain_and_wide(monkeypatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = shown(io.StringIO())
    assert "[path]" in text and "x" * 200 in text and "\x1b" not in text


def test_a_terminal_has_colours_and_its_own_width(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(Terminal())
    assert "\x1b[31mdone" in text and "x" * 60 in text and "x" * 80 not in text
