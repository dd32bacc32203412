"""Signals, the stop file, the time limit and a lost starter each ask for a stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from vqmoe_megatron.launch.local_ranks import STARTER_VARIABLE, STOP_SIGNALS
from vqmoe_megatron.train.stop_requests import (
    NO_REQUEST,
    REASONS,
    SIGNAL,
    STARTER_GONE,
    STOP_FILE_FOUND,
    TIME_LIMIT,
    StopRequests,
)


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whether or not these tests run under nohup
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_and_a_second_one_only_raise_a_flag(number):
    requests = StopRequests({})
    assert requests.current() == NO_REQUEST
    for _ in range(2):
        os.kill(os.getpid(), number)
        assert requests.current() == SIGNAL


EARLY_SIGNAL = """
import os, signal
from vqmoe_megatron.launch.local_ranks import STOP_SIGNALS
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as local_ranks starts its ranks
os.kill(os.getpid(), signal.SIGTERM)
from vqmoe_megatron.train.stop_requests import SIGNAL, StopRequests
print(StopRequests({}).current() == SIGNAL)
"""


def test_a_signal_sent_before_the_handlers_is_kept():
    # A process of its own: in this one, a thread that does not block the signal would receive it.
    result = subprocess.run([sys.executable, "-c", EARLY_SIGNAL], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    requests = StopRequests({})
    os.kill(os.getpid(), signal.SIGHUP)
    assert requests.current() == NO_REQUEST
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.current() == SIGNAL


ENDING = """
import atexit, os, signal, sys
from vqmoe_megatron.train.stop_requests import StopRequests

requests = StopRequests({})

class Late:  # finalised behind the interpreter's own handlers
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, 15)

sys.late = Late()
if sys.argv[1] == "close":
    requests.close()
sys.exit(75)
"""


@pytest.mark.parametrize("ends, code", [("close", 75), ("open", -signal.SIGTERM)])
def test_a_signal_at_the_very_end_changes_nothing(ends, code):
    assert subprocess.run([sys.executable, "-c", ENDING, ends]).returncode == code


def test_the_stop_file_counts_where_it_is_polled_and_is_removed(tmp_path):
    polls, other = StopRequests({}), StopRequests({})
    polls.watch(tmp_path, None, polls_files=True)
    other.watch(tmp_path, None, polls_files=False)
    (tmp_path / "STOP").touch()
    assert (polls.current(), other.current()) == (STOP_FILE_FOUND, NO_REQUEST)
    other.acknowledge()
    assert (tmp_path / "STOP").exists()
    polls.acknowledge()
    assert not (tmp_path / "STOP").exists()
    polls.acknowledge()


def test_the_time_limit(tmp_path):
    requests = StopRequests({})
    requests.watch(tmp_path, 60.0, polls_files=True)
    assert requests.current() == NO_REQUEST
    requests.watch(tmp_path, 0.0, polls_files=True)
    assert requests.current() == TIME_LIMIT


def test_a_lost_starter_is_noticed():
    assert StopRequests({STARTER_VARIABLE: str(os.getppid())}).current() == NO_REQUEST
    assert StopRequests({STARTER_VARIABLE: str(os.getppid() + 1)}).current() == STARTER_GONE


def test_every_request_has_a_reason():
    assert set(REASONS) == {TIME_LIMIT, STOP_FILE_FOUND, STARTER_GONE, SIGNAL}
