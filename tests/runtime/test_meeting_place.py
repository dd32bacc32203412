"""MASTER_ADDR: names, addresses with and without brackets, and what is no host."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from vqmoe_megatron.runtime import rendezvous
from vqmoe_megatron.runtime.meeting_place import HostLookup, MeetingPlace
from vqmoe_megatron.runtime.rendezvous import RendezvousFailed, StoppedWhileWaiting, meet


def place(host: str) -> MeetingPlace:
    return MeetingPlace.from_environ({"MASTER_ADDR": host, "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    ("text", "host", "shown"),
    [
        ("n1", "n1", "n1:29500"),
        ("10.0.0.7", "10.0.0.7", "10.0.0.7:29500"),
        ("::1", "::1", "[::1]:29500"),
        ("[::1]", "::1", "[::1]:29500"),
        (" [fd00::2] ", "fd00::2", "[fd00::2]:29500"),
        ("[fe80::1%eth0]", "fe80::1%eth0", "[fe80::1%eth0]:29500"),
        ("fe80::1%eth0", "fe80::1%eth0", "[fe80::1%eth0]:29500"),
        ("n1\n", "n1", "n1:29500"),
    ],
)
def test_hosts_as_people_write_them(text, host, shown) -> None:
    assert place(text).host == host and str(place(text)) == shown


@pytest.mark.parametrize("text", ["", " ", "[]"])
def test_no_host(text) -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR is not set"):
        place(text)


@pytest.mark.parametrize(
    "host",
    [
        "[::1",
        "[::1]:29500",
        "127.0.0.1:29500",
        "tcp://127.0.0.1",
        "fe80::1%no_such_interface",
        "a b",
        "::g",
        "label." * 60 + "x" * 70,
        "a..b",
        "*",
        "0",
        "0.0.0.0",
        "0x0",
        "::",
        "[::]",
        "224.0.0.1",
        "255.255.255.255",
        "n1\0",
        "n1 29500",
        "\udcff",
    ],
)
def test_what_is_no_host_is_refused_at_once_on_every_rank(host) -> None:
    for rank in (0, 1):
        started = time.monotonic()
        with pytest.raises(ValueError) as caught:
            meet(place(host), rank, 2, wait_seconds=60)
        assert time.monotonic() - started < 20
        assert str(caught.value).startswith(f"MASTER_ADDR={place(host).host} is no host that this")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("port", ["29500", " 29500 ", "29500\n"])
def test_blanks_around_a_port_are_no_part_of_it(port) -> None:
    assert MeetingPlace.from_environ({"MASTER_ADDR": "n1", "MASTER_PORT": port}).port == 29500


@pytest.mark.parametrize(
    "port", ["0", "65536", "-1", "+1", "1_0", "29500.0", "n1", "٣", "2950 0", "9" * 5000]
)
def test_what_is_no_port_is_refused(port) -> None:
    with pytest.raises(ValueError, match=r"MASTER_PORT=.* is not a port \(1 to 65535\)"):
        MeetingPlace.from_environ({"MASTER_ADDR": "n1", "MASTER_PORT": port})


def silent(*_args, **_kwargs) -> None:
    time.sleep(5)
    raise socket.gaierror(socket.EAI_NONAME, "too late")


def again(*_args, **_kwargs) -> None:
    raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@pytest.mark.parametrize(
    ("resolver", "problem"), [(silent, "no answer yet"), (again, "Temporary failure in name")]
)
def test_a_name_service_that_is_away_is_told_of_and_given_up(
    monkeypatch, capsys, resolver, problem
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    monkeypatch.setattr(rendezvous, "LOOKUP_SECONDS", 2.0)
    with pytest.raises(RendezvousFailed) as caught:
        meet(place("n1"), 1, 2, wait_seconds=60)
    assert "could not look MASTER_ADDR=n1 up within 2 s" in str(caught.value)
    assert problem in str(caught.value)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("rank 1 of 2: looking MASTER_ADDR=n1 up: ")


def test_a_look_up_can_be_called_off(monkeypatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", silent)
    started = time.monotonic()
    with pytest.raises(StoppedWhileWaiting):
        meet(place("n1"), 1, 2, should_stop=lambda: True, wait_seconds=60)
    assert time.monotonic() - started < 4


def test_a_name_service_that_comes_back_is_asked_again(monkeypatch) -> None:
    answers = iter([again, lambda *_args, **_kwargs: []])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: next(answers)())
    lookup = HostLookup(place("n1"))
    lookup.start()
    lookup.join(30)
    assert lookup.problem is None and not lookup.is_alive()
    lookup.check()


def test_who_is_waited_for_is_said_now_and_again(monkeypatch, capsys) -> None:
    monkeypatch.setattr(rendezvous, "NOTICE_AFTER_SECONDS", 0.5)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = MeetingPlace("127.0.0.1", port)
    failed: list[RendezvousFailed] = []

    def come(rank: int, wait_seconds: float) -> None:
        try:
            meet(here, rank, 4, wait_seconds=wait_seconds)
        except RendezvousFailed as error:
            failed.append(error)

    come(1, 1.5)  # nobody listens yet
    said = capsys.readouterr().err
    assert f"rank 1 of 4: seeking rank 0 at {here}, at most 1.5 s; last attempt:" in said
    other = threading.Thread(target=come, args=(2, 60))
    other.start()
    come(0, 3)
    other.join(60)
    said = [line for line in capsys.readouterr().err.splitlines() if "waiting at" in line]
    assert len(said) == 1, said  # one rank speaks for all
    assert said[0].startswith(f"rank 0 of 4: waiting at {here} for ranks ")
    assert "1 3, at most 3 s" in said[0] or "1 2 3, at most 3 s" in said[0]
    assert len(failed) == 3
