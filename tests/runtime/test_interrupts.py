"""SIGINT within is one line and exit code 130; who ignores or handles it himself is left alone."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from vqmoe_megatron.runtime.interrupts import Interrupted, one_line_interrupt


@pytest.fixture
def handler():
    """Set SIGINT's handler; the test's own comes back."""
    previous = signal.getsignal(signal.SIGINT)
    yield lambda wanted: signal.signal(signal.SIGINT, wanted)
    signal.signal(signal.SIGINT, previous)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_is_said_once_after_clean_up_and_the_next_one_kills(handler, capsys) -> None:
    handler(signal.default_int_handler)
    with pytest.raises(Interrupted) as ended, one_line_interrupt():
        try:
            interrupt()
        finally:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
            print("cleaned up")
    assert ended.value.code == 130
    assert capsys.readouterr() == ("cleaned up\n", "interrupted\n")


def test_afterwards_the_handler_is_python_s_own_again(handler) -> None:
    handler(signal.default_int_handler)
    with one_line_interrupt():
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_ignored_or_handled_interrupt_stays_so(handler, capsys) -> None:
    received = []
    for mine in (signal.SIG_IGN, lambda number, frame: received.append(number)):
        handler(mine)
        with one_line_interrupt():
            interrupt()
        assert signal.getsignal(signal.SIGINT) is mine
    assert received == [signal.SIGINT] and capsys.readouterr().err == ""


def test_another_thread_sets_no_handler(handler) -> None:
    handler(signal.default_int_handler)
    seen = []

    def work() -> None:
        with one_line_interrupt():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
