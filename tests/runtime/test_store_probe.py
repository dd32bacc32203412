"""A store is told from what else may listen on its port, without a word from c10d."""

from __future__ import annotations

import datetime
import socket
import threading
from collections.abc import Iterator

import pytest
from torch.distributed import TCPStore

from vqmoe_megatron.runtime import rendezvous
from vqmoe_megatron.runtime.meeting_place import MeetingPlace
from vqmoe_megatron.runtime.rendezvous import RendezvousFailed, meet
from vqmoe_megatron.runtime.store_probe import ForeignServer, probe_store

ANSWERS = [b"", b"HTTP/1.0 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"ab"]


@pytest.fixture
def foreign(request) -> Iterator[int]:
    """The port of a program that answers so, and hangs up."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.recv(64)
                connection.sendall(request.param)

    threading.Thread(target=serve, daemon=True).start()
    yield server.getsockname()[1]
    server.close()


@pytest.mark.parametrize("is_libuv", [True, False])
def test_a_store_answers_and_goes_on(is_libuv: bool) -> None:
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=is_libuv,
        timeout=datetime.timedelta(seconds=10),
    )  # fmt: skip
    for _ in range(3):
        probe_store("127.0.0.1", store.port, 10)
    store.set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.parametrize("foreign", ANSWERS, indirect=True)
def test_another_program_does_not(foreign: int) -> None:
    with pytest.raises(ForeignServer, match="does not answer as a store"):
        probe_store("127.0.0.1", foreign, 10)


def test_silence_and_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(TimeoutError, match="does not answer as a store"):
            probe_store("127.0.0.1", port, 0.2)
    with pytest.raises(ConnectionRefusedError):
        probe_store("127.0.0.1", port, 10)


@pytest.mark.parametrize("foreign", ANSWERS[:2], indirect=True)
def test_a_rank_gives_a_foreign_port_up_in_one_sentence(foreign: int, monkeypatch, capfd) -> None:
    monkeypatch.setattr(rendezvous, "FOREIGN_SECONDS", 0.5)
    with pytest.raises(RendezvousFailed, match="found another program at .* another MASTER_PORT"):
        meet(MeetingPlace("127.0.0.1", foreign), 1, 2, wait_seconds=60)
    assert capfd.readouterr().err == ""
