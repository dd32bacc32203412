"""Starting and watching ranks, with a stand-in for the command so that a rank costs no imports."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "vqmoe_megatron" / "launch" / "local_ranks.py"
KILLED = "was killed by SIGKILL, most likely out of memory"
# What each rank runs: argument r is what rank r does.
STAND_IN = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
deed = sys.argv[1:][rank]
open(f"pid_{rank}", "w").write(str(os.getpid()))
if deed == "wait":
    received = []
    stops = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP}
    assert stops <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
    for number in stops:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: received.append(1))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
    open(f"ready_{rank}", "w").close()
    while not received:
        time.sleep(0.01)
    sys.exit(75)
if deed == "variables":
    names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "VQMOE_STARTER_PID")
    open(f"variables_{rank}", "w").write(" ".join(os.environ[name] for name in names))
    sys.exit(0)
if deed == "hang":
    time.sleep(600)
if deed == "abort":
    os.abort()
if deed == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(deed))
"""
DRIVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("local_ranks", sys.argv[1])
local_ranks = importlib.util.module_from_spec(spec)
sys.modules["local_ranks"] = local_ranks
spec.loader.exec_module(local_ranks)
local_ranks.GRACE_SECONDS = 0.3
ended = local_ranks.run_local_ranks(sys.argv[2:], len(sys.argv) - 2)
print(ended.code, ended.was_killed, ended.failure)
"""


@pytest.fixture
def start(tmp_path):
    package = tmp_path / "vqmoe_megatron"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(STAND_IN)
    (package / "runtime").mkdir()
    shutil.copy(SOURCE.parents[1] / "runtime" / "exit_codes.py", package / "runtime")
    (tmp_path / "driver.py").write_text(DRIVER)
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")
    }
    processes = []

    def run(*deeds: str, hang_up: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen:
        processes.append(
            subprocess.Popen(
                [sys.executable, "driver.py", str(SOURCE), *deeds],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=tmp_path,
                env=environment,
                preexec_fn=lambda: signal.signal(signal.SIGHUP, hang_up),
            )
        )
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


def is_running(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(
    ("deeds", "expected"),
    [
        (("0", "0"), "0 False None"),
        (("75", "75"), "75 False None"),
        (("0", "2"), "2 False rank 1 ended with exit code 2"),
        (("hang", "1"), "1 False rank 1 ended with exit code 1"),
        (("hang", "kill", "hang"), f"137 True rank 1 {KILLED}"),
        (("hang", "abort"), "134 False rank 1 was killed by SIGABRT"),
    ],
)
def test_the_end_names_the_first_rank_that_failed_and_leaves_none_behind(
    start, tmp_path, deeds, expected
):
    output, errors = start(*deeds).communicate(timeout=20)
    assert output.strip() == expected
    if "None" not in expected:
        assert expected.split(" ", 2)[2] in errors and len(errors.splitlines()) == 1
    assert not any(is_running(file) for file in tmp_path.glob("pid_*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_a_stop_signal_reaches_every_rank_even_while_it_starts(number, start, tmp_path):
    process = start("wait", "wait")
    while not (tmp_path / "pid_0").exists():  # rank 1 may still be starting
        time.sleep(0.001)
    for _ in range(2):
        process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (output.strip(), errors) == ("75 False None", "")


def test_under_nohup_a_hang_up_stops_no_rank(start, tmp_path):
    process = start("wait", "wait", hang_up=signal.SIG_IGN)
    while len(list(tmp_path.glob("ready_*"))) < 2:
        time.sleep(0.001)
    process.send_signal(signal.SIGHUP)
    for file in tmp_path.glob("pid_*"):
        os.kill(int(file.read_text()), signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert output.strip() == "75 False None"


def test_ranks_get_torchruns_variables_and_their_starter(start, tmp_path):
    process = start("variables", "variables")
    output, _ = process.communicate(timeout=20)
    assert output.startswith("0 ")
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    for rank in range(2):
        found = (tmp_path / f"variables_{rank}").read_text().split()
        assert found == ["2", str(rank), "127.0.0.1", threads, str(process.pid)]


def test_cores_are_shared():
    spec = importlib.util.spec_from_file_location("local_ranks_alone", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    cores = len(os.sched_getaffinity(0))
    assert module.threads_per_rank(1) == cores
    assert module.threads_per_rank(10 * cores) == 1
