"""``launchers/rank.sh``: exit codes and signals between Slurm and a rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from shell_run import ROOT

RANK = str(ROOT / "launchers" / "rank.sh")


@pytest.mark.parametrize(("code", "seen"), [(0, 0), (75, 0), (1, 1), (2, 2), (137, 137)])
def test_exit_code(code, seen) -> None:
    assert subprocess.run([RANK, "bash", "-c", f"exit {code}"], timeout=60).returncode == seen


def test_a_signal_before_the_handler_waits_for_it(tmp_path) -> None:
    """As Slurm does, it goes to every process of the step, the shell included."""
    ready = tmp_path / "ready"
    program = (
        f"import signal, sys, time, pathlib; pathlib.Path({str(ready)!r}).touch(); time.sleep(1)\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1]); time.sleep(30); sys.exit(3)"
    )
    step = subprocess.Popen([RANK, sys.executable, "-c", program], start_new_session=True)
    while not ready.exists():
        assert step.poll() is None
        time.sleep(0.05)
    os.killpg(step.pid, signal.SIGUSR1)
    assert step.wait(timeout=60) == 0


def test_the_node_number_reaches_torchrun() -> None:
    done = subprocess.run(
        [RANK, "bash", "-c", "echo $PET_NODE_RANK"],
        env={"PATH": "/usr/bin:/bin", "SLURM_NODEID": "3"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "3\n"
