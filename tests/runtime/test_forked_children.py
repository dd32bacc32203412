"""Forks of a killed process, and forks of those, are killed with it."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

PROGRAM = """
import os, signal, time
from vqmoe_megatron.runtime.forked_children import end_forks_with_parent
end_forks_with_parent()
if os.fork() == 0:
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_killed_process_takes_its_forks_along():
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 10
    forks: list[psutil.Process] = []
    while len(forks) < 2 and time.monotonic() < deadline:
        forks = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert len(forks) == 2
    gone, alive = psutil.wait_procs(forks, timeout=5)
    assert alive == []
