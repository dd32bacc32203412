"""Notices of a wait: none at first, then now and again; and whoever waits in a call is heard."""

from __future__ import annotations

import contextlib
import sys
import time

from vqmoe_megatron.rundir import waiting
from vqmoe_megatron.rundir.waiting import WaitNotices, tell, told_while_waiting


def test_a_short_wait_is_silent_and_a_long_one_is_not(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    said: list[str] = []
    notices = WaitNotices(said.append, first_seconds=5, every_seconds=30)
    for now[0] in (100, 104.9, 105, 134, 135, 136, 165):
        notices.look(lambda: "waiting for Godot")
    assert said == [f"waiting for Godot ({seconds} s so far)" for seconds in (5, 35, 65)]


def test_a_call_that_blocks_is_told_of_while_it_lasts(monkeypatch) -> None:
    monkeypatch.setattr(waiting, "SLOW_SECONDS", 0.1)
    said: list[str] = []
    with told_while_waiting("a slow store", said.append):
        deadline = time.monotonic() + 30
        while not said and time.monotonic() < deadline:
            time.sleep(0.02)
    assert said and said[0].startswith("a slow store (")
    with told_while_waiting("a quick store", said.append):
        pass
    assert not any("quick" in text for text in said)


def test_a_console_that_is_gone_loses_the_notice_only(monkeypatch, tmp_path) -> None:
    stream = (tmp_path / "gone").open("w")
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    tell("nobody hears it")
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stderr", full)
    tell("a full disk")
    with contextlib.suppress(OSError):
        full.close()
