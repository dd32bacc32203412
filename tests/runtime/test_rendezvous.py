"""Ranks that meet, wait, are called off, or miss each other: real processes and real signals."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vqmoe_megatron.runtime.meeting_place import MeetingPlace

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).resolve().parents[2]
# One rank: it says how the wait ended, and when. Arguments: seconds to wait for the others, seconds
# to come late.
RANK = """
import os, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
import torch
from vqmoe_megatron.runtime.rendezvous import RendezvousFailed, StoppedWhileWaiting
from vqmoe_megatron.runtime.world import discover_rank, join_world
variables = discover_rank()
wait_seconds, late_seconds = float(sys.argv[1]), float(sys.argv[2])
print("starting", flush=True)
time.sleep(late_seconds)
started = time.monotonic()
try:
    join_world(variables, "cpu", lambda: bool(asked), wait_seconds)
except (RendezvousFailed, StoppedWhileWaiting) as error:
    ended = time.time()
    print(f"{type(error).__name__}: {error}")
    print(f"ended_at={ended}")
    sys.exit(75 if isinstance(error, StoppedWhileWaiting) else 1)
waited = time.monotonic() - started
total = torch.tensor([variables.rank + 1])
torch.distributed.all_reduce(total)
print(f"sum={int(total)} waited={waited:.1f}")
torch.distributed.destroy_process_group()
"""
# Imports torch once and then forks a rank for every line it reads; answers with its process id, or
# with the exit code of one that it is asked to wait for.
NURSERY = """
import json, os, sys, time, traceback
import vqmoe_megatron.runtime.world
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        deadline = time.monotonic() + 60
        pid, status = 0, 0
        while not pid and time.monotonic() < deadline:
            pid, status = os.waitpid(job["wait"], os.WNOHANG)
            time.sleep(0.02)
        print(os.waitstatus_to_exitcode(status) if pid else "hangs", flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.environ.update(job["environment"])
    sys.argv = job["argv"]
    output = os.open(job["output"], os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        exec(open(sys.argv[0]).read(), {"__name__": "__main__"})
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)
"""


class Ranks:
    """The processes of one test, with their output in files."""

    def __init__(self, folder: Path, nursery: subprocess.Popen) -> None:
        self.script = folder / "rank.py"
        self.script.write_text(RANK)
        self.folder = folder
        self.nursery = nursery
        self.port = free_port()
        self.pids: dict[str, int] = {}  # of those that run

    def start(
        self,
        rank: int,
        world_size: int,
        wait_seconds: float = 30.0,
        late_seconds: float = 0.0,
        name: str = "",
        address: str = "127.0.0.1",
    ) -> None:
        name = name or str(rank)
        self.pids[name] = self._ask(
            environment={
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": address,
                "MASTER_PORT": str(self.port),
            },
            argv=[str(self.script), str(wait_seconds), str(late_seconds)],
            output=str(self.folder / name),
        )

    def _ask(self, **job) -> int:
        self.nursery.stdin.write(json.dumps(job) + "\n")
        self.nursery.stdin.flush()
        return json.loads(self.nursery.stdout.readline())

    def text(self, name: str | int) -> str:
        path = self.folder / str(name)
        return path.read_text() if path.exists() else ""

    def wait_until_started(self) -> None:
        deadline = time.monotonic() + 60
        while not all("starting" in self.text(name) for name in self.pids):
            assert time.monotonic() < deadline, "the ranks do not start"
            time.sleep(0.02)

    def send(self, rank: int, number: int) -> float:
        """Send a signal and return the time."""
        os.kill(self.pids[str(rank)], number)
        return time.time()

    def codes(self) -> dict[str, int]:
        """Wait for all that run; their exit codes."""
        return {name: self._ask(wait=self.pids.pop(name)) for name in list(self.pids)}

    def ended_at(self, name: str | int) -> float:
        return float(self.text(name).split("ended_at=")[1].split()[0])


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="module")
def nursery():
    process = subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    yield process
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture
def world(tmp_path, nursery):
    ranks = Ranks(tmp_path, nursery)
    yield ranks
    for pid in ranks.pids.values():
        os.kill(pid, signal.SIGKILL)
    ranks.codes()


@pytest.mark.parametrize(
    "late", [0, pytest.param(1, marks=pytest.mark.full)], ids=["rank-0-late", "rank-1-late"]
)
def test_a_rank_that_comes_3_s_late_is_waited_for(world, late) -> None:
    world.start(late, 2, late_seconds=3)
    world.start(1 - late, 2)
    assert world.codes() == {"0": 0, "1": 0}
    waited = [float(world.text(rank).split("waited=")[1]) for rank in (0, 1)]
    assert "sum=3" in world.text(0) and "sum=3" in world.text(1)
    assert waited[late] < 2 < waited[1 - late]


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 loopback here")
@pytest.mark.parametrize("address", ["[::1]", "::1"])
def test_ranks_meet_at_an_ipv6_address(world, address) -> None:
    for rank in (0, 1):
        world.start(rank, 2, address=address)
    assert world.codes() == {"0": 0, "1": 0}
    assert "sum=3" in world.text(0) and "sum=3" in world.text(1)


def test_a_rank_that_never_comes_is_named_by_all_who_came(world) -> None:
    world.start(0, 3, wait_seconds=4)
    world.start(2, 3, wait_seconds=30)  # it learns from rank 0
    assert world.codes() == {"0": 1, "2": 1}
    for rank in (0, 2):
        text = world.text(rank)
        assert f"2 of 3 ranks met at 127.0.0.1:{world.port}" in text
        assert "missing: rank 1. Check" in text and "Traceback" not in text


def test_without_rank_0_the_message_says_where_it_was_sought(world) -> None:
    world.start(1, 2, wait_seconds=1)
    assert world.codes() == {"1": 1}
    text = world.text(1)
    assert f"rank 1 of 2 did not reach rank 0 at 127.0.0.1:{world.port} within 1 s" in text
    assert "Connection refused" in text and "MASTER_ADDR" in text and "Traceback" not in text


@pytest.mark.parametrize("asked", [0, 1])
def test_sigterm_to_one_waiting_rank_releases_all(world, asked) -> None:
    world.start(0, 3)
    world.start(1, 3)
    world.wait_until_started()
    time.sleep(1.0)  # they have met, but rank 2 never comes
    sent = world.send(asked, signal.SIGTERM)
    assert world.codes() == {"0": 75, "1": 75}
    for rank in (0, 1):
        assert f"StoppedWhileWaiting: rank {asked} was asked to stop" in world.text(rank)
        assert world.ended_at(rank) - sent < 2


def test_a_rank_that_seeks_rank_0_can_be_stopped(world) -> None:
    world.start(1, 2)
    world.wait_until_started()
    sent = world.send(1, signal.SIGTERM)
    assert world.codes() == {"1": 75}
    assert world.ended_at(1) - sent < 2


def test_silence_of_a_foreign_server_can_be_interrupted(world) -> None:
    with socket.create_server(("127.0.0.1", world.port)):
        world.start(1, 2, wait_seconds=1)
        assert world.codes() == {"1": 1}
    assert "no answer yet" in world.text(1)


def test_a_port_in_use_is_one_message(world) -> None:
    with socket.create_server(("", world.port)):
        world.start(0, 2)
        assert world.codes() == {"0": 1}
    assert f"rank 0 cannot listen on port {world.port}" in world.text(0)
    assert "choose another MASTER_PORT" in world.text(0)


def test_two_processes_with_one_number_end_the_wait(world) -> None:
    world.start(0, 3)
    world.start(1, 3)
    world.start(1, 3, name="twin")
    assert world.codes() == {"0": 1, "1": 1, "twin": 1}
    for name in (0, 1, "twin"):
        assert "two processes came to" in world.text(name) and "as rank 1" in world.text(name)


def test_a_vanished_rank_0_is_noticed(world) -> None:
    world.start(0, 3)
    world.start(1, 3)
    world.wait_until_started()
    time.sleep(1.0)
    world.send(0, signal.SIGKILL)
    assert world.codes() == {"0": -signal.SIGKILL, "1": 1}
    assert "rank 1 lost the store" in world.text(1)


@pytest.mark.full
def test_torchrun_hosts_the_store_and_its_attempts_are_apart(world, tmp_path) -> None:
    script = tmp_path / "restarted.py"
    # Rank 1 fails in the first attempt, after both ranks have met.
    script.write_text(
        RANK + "\nfirst = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "print('first' if first else 'second')\n"
        "sys.exit(1 if first and variables.rank else 0)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--max-restarts=1", f"--master-port={world.port}", str(script), "30", "0"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("second") == 2 and done.stdout.count("sum=3") == 4


def test_the_place_under_torchrun_and_elsewhere() -> None:
    plain = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    assert MeetingPlace.from_environ(plain) == MeetingPlace("n1", 29500, False, "vqmoe/")
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    place = MeetingPlace.from_environ({**plain, **agent})
    assert place.is_hosted and "attempt_2" in place.prefix
    assert not MeetingPlace.from_environ(
        {**plain, **agent, **{next(iter(agent)): "False"}}
    ).is_hosted
