"""A ``vqmoe`` command as a user starts it, in a process of its own, within a part's time."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from collections import deque
from pathlib import Path

from vqmoe_megatron.gpu_proof.part import Job
from vqmoe_megatron.runtime.exit_codes import end_in_words

SHOWN_LINES = 8
GRACE_SECONDS = 5.0
TINY_TEXT = ("typing.py", "inspect.py", "argparse.py")


class CommandFailed(Exception):
    """The command ended otherwise than wanted; with its last lines."""


def run_vqmoe(job: Job, *words: str, kept_seconds: float = 0.0) -> None:
    """Run ``vqmoe WORDS``; its output goes to the part's log.

    ``kept_seconds`` of the part's time are for what comes after it.

    Raises:
        CommandFailed: for any exit code but 0, or when the part's time is over.
    """
    log = job.work / "command.log"
    command = [sys.executable, "-m", "vqmoe_megatron.cli", *words]
    print("$ vqmoe", *words, flush=True)
    try:
        with log.open("w") as output:
            code = _run(command, output, max(1.0, job.seconds_left - kept_seconds))
    finally:
        sys.stdout.write(log.read_text("utf-8", "replace"))
        sys.stdout.flush()
    if code != 0:
        how = "was stopped: no time left" if code is None else end_in_words(code)
        raise CommandFailed(f"vqmoe {' '.join(words[:2])} {how}; its last lines:\n{_tail(log)}")


def _run(command: list[str], output, seconds: float) -> int | None:  # noqa: ANN001
    """The exit code; None when it did not end in time."""
    # In the part's session, so that whoever ends the part ends this, too.
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
    )
    try:
        return child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.terminate()
        try:
            child.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        return None


def _tail(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, maxlen=SHOWN_LINES)).rstrip()


def prepare_corpus(job: Job) -> Path:
    """Prepare Python's own library, three files of it in the tiny size, as a corpus of bytes.

    It needs no network, and parts of one proof share it.
    """
    out = job.work.parent / "corpus"
    job.say("preparing the corpus")
    words = ["stdlib"]
    if job.is_tiny:
        library = Path(sysconfig.get_path("stdlib"))
        words = ["text", *(f"--input={library / name}" for name in TINY_TEXT)]
    run_vqmoe(job, "prepare", *words, "--out", str(out))
    return out
