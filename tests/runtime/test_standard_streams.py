"""Output that cannot be encoded or written ends no program; whether that is a failure is asked."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTECTED = """
import sys, warnings
from vqmoe_megatron.runtime.standard_streams import (
    forgive_lost_output, lost_output, print_path, protect_standard_streams)
protect_standard_streams()
"""
# Through every way that a command prints, more than any buffer holds; then what it was there for.
CHATTY = (
    PROTECTED
    + """
from rich.console import Console
from rich.live import Live
with Live(console=Console(force_terminal=True)) as live:
    live.update("progress")
    print("a line above it")
for number in range(500):
    print("a line of the log", number, "." * 50)
    print("a complaint", number, "." * 50, file=sys.stderr)
Console().print("[bold]done[/]")
warnings.warn("careful")
sys.stdout.flush()
lost = lost_output()
forgive_lost_output()
open("result", "w").write(f"{lost and lost.strerror} {lost_output()}")
"""
)


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "PYTHONPATH": str(ROOT), **variables}


def closed_pipe() -> int:
    """The writing end of a pipe without a reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def hung_up_terminal() -> int:
    """A terminal whose other side is gone, as after a lost ssh: writing to it is EIO."""
    controller, terminal = pty.openpty()
    os.close(controller)
    return terminal


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


LOST = {  # what is said of it
    closed_pipe: "None",
    full_disk: "No space left on device",
    hung_up_terminal: "Input/output error",
}


@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("make", LOST)
def test_a_lost_stream_ends_nothing(make, which, tmp_path):
    lost = make()
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    streams |= {name: lost for name in streams if which in (name, "both")}
    command = [sys.executable, "-c", CHATTY]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), **streams)
    os.close(lost)
    assert done.returncode == 0, done.stderr
    said = "None" if which == "stderr" else LOST[make]
    assert (tmp_path / "result").read_text() == f"{said} None"
    if which == "stderr":
        assert done.stdout.count(b"a line of the log") == 500 and b"done" in done.stdout
    if which == "stdout":
        assert done.stderr.count(b"a complaint") == 500 and b"careful" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_descriptor_is_not_given_to_the_next_file(closed, tmp_path):
    program = f"{CHATTY}assert open('next', 'w').fileno() > 2\nopen('alive', 'w')\n"
    (tmp_path / "program.py").write_text(program)
    command = f"exec '{sys.executable}' program.py {closed}"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "alive").exists()


NAMES = "a_日本é_\\udcff"
SHOWN = {
    "ascii": b"a_???_\xff",
    "latin-1": b"a_??\xe9_\xff",
    "cp437": b"a_??\x82_\xff",
    "utf-8": "a_日本é_".encode() + b"\xff",
}


@pytest.mark.parametrize("encoding", SHOWN)
def test_what_an_encoding_lacks_is_replaced(encoding):
    program = f"""{PROTECTED}
from rich.console import Console
for stream in (sys.stdout, sys.stderr):
    print('{NAMES}', file=stream, flush=True)
    Console(file=stream).print('{NAMES}')
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(PYTHONIOENCODING=f"{encoding}:strict", LC_ALL="C", TERM="dumb"),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == done.stderr.splitlines() == [SHOWN[encoding]] * 2


def test_a_path_for_a_program_keeps_its_bytes():
    program = f"{PROTECTED}print('before')\nprint_path('{NAMES}')\nprint('after')\n"
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", program],
        env=environment(PYTHONIOENCODING="ascii"),
        capture_output=True,
        check=True,
    )
    assert done.stdout.splitlines() == [b"before", SHOWN["utf-8"], b"after"]


def test_a_full_pipe_that_does_not_block_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    program = f"{PROTECTED}print('x' * 1_000_000)\nassert lost_output() is None\n"
    received = []

    def read() -> None:
        while chunk := os.read(reader, 65_536):
            received.append(chunk)

    thread = threading.Thread(target=read)
    with subprocess.Popen([sys.executable, "-c", program], stdout=writer, env=environment()) as run:
        os.close(writer)
        thread.start()
        assert run.wait(timeout=60) == 0
    thread.join()
    os.close(reader)
    assert b"".join(received) == b"x" * 1_000_000 + b"\n"


STALLED = (
    PROTECTED
    + """
import time
from vqmoe_megatron.runtime import standard_streams
standard_streams.PATIENCE_SECONDS = 0.3
forgive_lost_output()
began = time.monotonic()
for number in range(5000):
    print("nobody reads this", number, "." * 50)
print(time.monotonic() - began, file=sys.stderr, flush=True)
sys.stdin.readline()
print("somebody reads again", flush=True)
"""
)


def test_a_reader_that_does_not_read_does_not_hold_a_run_up():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", STALLED], env=environment(), **pipes) as run:
        assert 0.3 <= float(run.stderr.readline()) < 20.0  # it waited once, not for every line
        seen = b""
        while b"this 100 " not in seen:
            seen += os.read(run.stdout.fileno(), 4096)
        rest, _ = run.communicate(b"\n", timeout=60)
    assert run.returncode == 0
    assert rest.endswith(b"somebody reads again\n") and b"this 2500 " not in seen + rest


def test_a_stream_that_somebody_replaced_is_left_alone():
    program = (
        "import io, sys\nsys.stdout = replaced = io.StringIO()\n"
        + PROTECTED
        + "assert sys.stdout is replaced and sys.stderr is not sys.__stderr__\n"
        "print_path('a/b'); assert replaced.getvalue() == 'a/b\\n'\n"
    )
    subprocess.run([sys.executable, "-c", program], env=environment(), check=True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_errors_are_written_line_by_line(tmp_path, unbuffered):
    """Not at the end, which a killed rank does not reach."""
    script = PROTECTED + "import os\nprint('a reason', file=sys.stderr)\nos._exit(3)"
    with (tmp_path / "errors").open("w") as errors:
        subprocess.run(
            [sys.executable, "-c", script],
            env=environment(PYTHONUNBUFFERED=unbuffered),
            stderr=errors,
        )
    assert (tmp_path / "errors").read_text() == "a reason\n"
