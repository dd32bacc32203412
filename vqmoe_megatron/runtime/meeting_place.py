"""Where ranks meet: MASTER_ADDR and MASTER_PORT, checked before anybody waits there.

A host is looked up first, and in a thread: a resolver can be silent for longer than a stop request
should wait. A name that does not exist is refused at once, a resolver that does not answer is asked
again for a while.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from vqmoe_megatron.config.declared_types import shown

LOOKUP_SECONDS = 30.0  # for a resolver that says "try again", or nothing
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class MeetingPlace:
    """Where the ranks meet. ``prefix`` keeps the attempts of one torchrun apart."""

    host: str  # a name or an address; IPv6 without brackets
    port: int
    is_hosted: bool = False  # by torchrun's agent
    prefix: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> MeetingPlace:
        """Read MASTER_ADDR, MASTER_PORT and torchrun's variables.

        Raises:
            ValueError: when the place is not set or the port is not one.
        """
        host = environ.get("MASTER_ADDR", "").strip()
        if host.startswith("[") and host.endswith("]"):  # an IPv6 address as URLs have it
            host = host[1:-1]
        if not host:
            raise ValueError(
                "MASTER_ADDR is not set; export the host name of rank 0's node (scontrol show "
                "hostnames | head -n1) for all ranks"
            )
        port = environ.get("MASTER_PORT", "").strip()
        if not port:
            raise ValueError("MASTER_PORT is not set; export one free port for all ranks")
        if not (re.fullmatch("[0-9]{1,9}", port) and 0 < int(port) < 2**16):
            raise ValueError(f"MASTER_PORT={shown(port)} is not a port (1 to 65535)")
        is_hosted = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        prefix = f"vqmoe/attempt_{attempt}/" if is_hosted else "vqmoe/"
        return cls(host, int(port), is_hosted, prefix)


def _names_no_machine(address: str) -> bool:
    """``0.0.0.0``, ``0``, ``::``: a rank elsewhere would seek rank 0 on its own node, in vain."""
    known = ipaddress.ip_address(address)
    return known.is_unspecified or known.is_multicast or address == "255.255.255.255"


class HostLookup(threading.Thread):
    """Asks the resolver for ``place``'s host until it answers or is no longer wanted.

    ``problem`` is what it said last, None once it knows the host; ``is_final`` when asking again
    cannot help.
    """

    def __init__(self, place: MeetingPlace) -> None:
        super().__init__(daemon=True)
        self.place = place
        self.problem: str | None = "no answer yet"
        self.is_final = False
        self.is_wanted = True

    def run(self) -> None:
        """Ask until there is an answer."""
        while self.is_wanted:
            try:
                found = socket.getaddrinfo(
                    self.place.host, self.place.port, type=socket.SOCK_STREAM
                )
                addresses = [str(address[0]) for *_, address in found]
                # glibc takes * for the loopback.
                if self.place.host == "*" or any(map(_names_no_machine, addresses)):
                    self.problem, self.is_final = "it names no single machine", True
                else:
                    self.problem = None
                return
            except socket.gaierror as error:
                self.problem = error.strerror or str(error)
                if error.errno != socket.EAI_AGAIN:
                    self.is_final = True
                    return
            except (OSError, UnicodeError) as error:  # no legal name: too long, an empty label
                self.problem, self.is_final = str(error), True
                return
            time.sleep(RETRY_SECONDS)

    def check(self) -> None:
        """Raise ``ValueError`` when there is no such host."""
        if self.is_final:
            raise ValueError(
                f"MASTER_ADDR={self.place.host} is no host that this machine knows: "
                f"{self.problem}; give all ranks the name or the address of rank 0's node, without "
                "a port (IPv6 with or without brackets)"
            )
