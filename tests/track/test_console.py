"""The console: plain lines in a log, a live display on a (pseudo) terminal, always restored."""

import io
import os
import pty
import re
import subprocess
import sys

import pytest

from vqmoe_megatron.track.console import RunConsole, format_duration

RECORD = {
    "iteration": 20,
    "loss": 3.21451,
    "grad_norm": 1.5,
    "consumed_tokens": 99,
    "step_time_ms": 1000.0,
    "tokens_per_second": 123456.7,
    "vq/code_perplexity": 45.21,
    "vq/dead_codes": 3,
    "vq/layer_01/dead_codes": 3,
}


def test_a_log_gets_one_grepable_line_per_record(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with RunConsole(200, bytes_per_token=2.0, stream=stream) as console:
        console.update(RECORD)
        console.update({"iteration": 200, "loss": float("nan"), "val/bits_per_byte": 1.25})
    assert stream.getvalue().splitlines() == [
        "iteration 20/200 | loss 3.2145 | bits_per_byte 2.3188 | grad_norm 1.500 | "
        "tokens_per_second 123457 | step_time_ms 1000.0 | vq/code_perplexity 45.2 | "
        "vq/dead_codes 3 (sum of all layers) | eta 3:00",
        "iteration 200/200 | loss nan | bits_per_byte nan | val/bits_per_byte 1.2500",
    ]


def test_bits_per_byte_needs_to_know_the_bytes():
    stream = io.StringIO()
    RunConsole(200, stream=stream).update(RECORD)
    assert "loss 3.2145" in stream.getvalue() and "bits_per_byte" not in stream.getvalue()


def test_messages_and_tables_are_written_as_they_are():
    stream = io.StringIO()
    with RunConsole(1, stream=stream) as console:
        console.message("a [bold]path[/] " + "x" * 300)
        console.table("Sizes", [("experts", 16), ("[codes]", 64)], headers=("what", "num"))
        console.table("Empty", [])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "a [bold]path[/] " + "x" * 300
    assert "[codes]" in stream.getvalue() and "what" in stream.getvalue()
    assert any(re.search(r"experts\W+16", line) for line in lines)


PROGRAM = """
import os
from vqmoe_megatron.track.console import RunConsole
try:
    with RunConsole(200, bytes_per_token=1.0) as console:
        console.update({"iteration": 50, "loss": 2.0, "val/loss": 2.5, "step_time_ms": 100.0})
        console.message("a message")
        print("a stray print")
        raise KeyError
except KeyError:
    os.write(1, b"LEFT")
"""


def run_on_a_terminal(term):
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": term, "COLUMNS": "100", "LINES": "40"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=child, env=environment)
    os.close(child)
    output = b""
    try:
        while chunk := os.read(parent, 4096):
            output += chunk
    except OSError:  # the terminal's other end is closed: the program has ended
        pass
    os.close(parent)
    assert process.wait() == 0
    return output.decode()


def test_a_terminal_gets_a_live_display_and_its_cursor_back_after_an_exception():
    output = run_on_a_terminal("xterm-256color")
    hidden, shown, left = (output.rindex(text) for text in ("\x1b[?25l", "\x1b[?25h", "LEFT"))
    assert hidden < shown < left
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "iteration 50/200" in plain and "25%" in plain and "ETA 0:15" in plain
    assert "bits_per_byte 2.8854" in plain
    assert "iteration 50/200 | val/loss 2.5000" in plain
    assert "a message" in plain and "a stray print" in plain


def test_a_terminal_that_cannot_redraw_gets_lines():
    output = run_on_a_terminal("dumb")
    assert "\x1b[?25l" not in output
    assert "iteration 50/200 | loss 2.0000 | bits_per_byte 2.8854" in output


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3723, "1:02:03")]
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
