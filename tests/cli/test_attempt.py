"""``vqmoe attempt``: one line for a shell to read, exit code 0 for every answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vqmoe_megatron import cli
from vqmoe_megatron.rundir.status import write_status

JOB = ["--job", "7", "--restart", "1", "--max-restarts", "3"]
BEGIN = [*JOB, "--max-idle-attempts", "1"]
DECIDE = [*JOB, "--iteration", "0", "--mark", "none"]


@pytest.fixture
def attempt(monkeypatch, capsys):
    """``attempt(*arguments)``: the exit code and the two streams of ``vqmoe attempt``."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)

    def run(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["vqmoe", "attempt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        streams = capsys.readouterr()
        return ended.value.code, streams.out, streams.err

    return run


def test_an_attempt_from_its_begin_to_its_decision(attempt, tmp_path) -> None:
    assert attempt("begin", tmp_path, *BEGIN) == (0, "begin 0 none\n", "")
    assert (tmp_path / "slurm_attempts.tsv").read_text() == "7\t1\t0\n"
    ended = "give-up the ranks ended before they wrote a status\n"
    assert attempt("decide", tmp_path, *DECIDE) == (0, ended, "")
    write_status(tmp_path, "requeue", 5, "told to stop")
    decided = "requeue iteration 0 -> 0: told to stop\n"
    assert attempt("decide", tmp_path, *DECIDE) == (0, decided, "")
    code, out, _ = attempt("begin", tmp_path, *BEGIN, "--restart", "2")
    assert code == 0 and out.startswith("give-up 1 attempts of job 7 began at iteration 0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["begin", "no/such/folder", *BEGIN], "error: no/such/folder/slurm_attempts.tsv cannot be"),
        (["begin", ".", *BEGIN[2:]], "--job"),
        (["decide", ".", *DECIDE[2:], "--job", "a b"], "error: job 'a b' must be a job's name"),
        (["decide", ".", *DECIDE, "--iteration", "-1"], "--iteration"),
    ],
)
def test_what_cannot_be_answered_is_refused(attempt, arguments, message) -> None:
    code, out, err = attempt(*arguments)
    assert (code, out) == (2, "") and message in err


@pytest.mark.parametrize("verb", ["begin", "decide"])
def test_help_has_an_example_and_the_exit_codes(attempt, verb) -> None:
    code, out, _ = attempt(verb, "--help")
    shown = " ".join(out.split())
    assert code == 0 and f"Example: vqmoe attempt {verb} RUN --job 7" in shown
    assert "Exits: 0 answered, whatever the answer; 2 usage" in shown


def test_the_rules_need_the_standard_library_alone() -> None:
    """A job asks in the minutes between its ranks' end and its own: slow imports are not for it."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import vqmoe_megatron.rundir.attempts\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(*new - sys.stdlib_module_names)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "vqmoe_megatron\n", done.stdout + done.stderr
