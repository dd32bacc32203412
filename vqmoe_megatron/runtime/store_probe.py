"""Is what listens at an address a TCPStore of torch's?

``TCPStore`` itself would answer for a foreign server with its C++ stack in the log, at every
attempt. So the first words of its protocol are spoken here: VALIDATE with its magic number, which
is not answered, and PING, whose number comes back.
"""

from __future__ import annotations

import os
import socket
import struct

VALIDATE, PING = 0, 13  # of c10d's QueryType
MAGIC = 0x3C85F7CE
UNLIKE_A_STORE = "connected, but what listens there does not answer as a store"


class ForeignServer(Exception):
    """Something listens there and answers, but not as a store does."""


def probe_store(host: str, port: int, timeout_seconds: float) -> None:
    """Return when a store answers at ``host:port``.

    Raises:
        OSError: nobody listens there, or nothing comes within the time.
        ForeignServer: another program answered, or hung up.
    """
    number = struct.pack("=I", os.getpid())
    with socket.create_connection((host, port), timeout_seconds) as connection:
        connection.sendall(struct.pack("=BIB", VALIDATE, MAGIC, PING) + number)
        answer = b""
        while len(answer) < len(number):
            try:
                part = connection.recv(len(number) - len(answer))
            except TimeoutError:
                raise TimeoutError(UNLIKE_A_STORE) from None
            except ConnectionError:
                part = b""
            if not part:
                raise ForeignServer(UNLIKE_A_STORE)
            answer += part
    if answer != number:
        raise ForeignServer(UNLIKE_A_STORE)
