"""Ranks meet in a store before their process group is made, and can be called off while they wait.

``init_process_group`` waits for its peers inside C++, where no Python signal handler runs. Here the
waiting is a Python loop, and afterwards ``init_process_group`` finds every rank already there.

1. MASTER_ADDR is looked up. Rank 0 hosts a TCPStore at MASTER_ADDR:MASTER_PORT; under torchrun its
   agent already does. The others try to reach it. Looking up and connecting are done in threads,
   because neither can be interrupted.
2. Every rank announces itself.
3. One verdict ends the wait for all: ``go`` once rank 0 sees every rank, ``stop`` when any rank is
   asked to stop, ``fail`` when time is over. The store accepts only the first, so no rank goes on
   while another turns back.
   Meanwhile a line now and again says who is waited for.
4. After ``stop`` and ``fail`` rank 0 keeps the store until the ranks that came have read why.
"""

from __future__ import annotations

import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from vqmoe_megatron.rundir.waiting import WaitNotices, tell
from vqmoe_megatron.runtime.meeting_place import LOOKUP_SECONDS, HostLookup, MeetingPlace
from vqmoe_megatron.runtime.rank_names import rank_names
from vqmoe_megatron.runtime.store_probe import ForeignServer, probe_store

POLL_SECONDS = 0.1
NOTICE_AFTER_SECONDS = 10.0  # ranks start one after another
PROBE_SECONDS = 5.0  # for one attempt to open a connection
FOREIGN_SECONDS = 5.0  # a store that is just ending hangs up too
LINGER_SECONDS = 1.5  # for others to read a verdict before rank 0 closes the store
STORE_SECONDS = 60.0  # for one answer of a store that is there

VERDICT = "verdict"
GO, STOP, FAIL = "go", "stop ", "fail "  # the latter two are followed by the reason


class StoppedWhileWaiting(Exception):
    """A rank was asked to stop before all ranks had met; every waiting rank raises it."""


class RendezvousFailed(RuntimeError):
    """The ranks did not meet; the message says who is missing and what to check.

    ``missing`` holds the numbers of the ranks that did not come, where this rank knows them.
    """

    def __init__(self, message: str, missing: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.missing = frozenset(missing)


def never_stop() -> bool:
    """Wait until the ranks have met or time is over."""
    return False


def meet(
    place: MeetingPlace,
    rank: int,
    world_size: int,
    should_stop: Callable[[], bool] = never_stop,
    wait_seconds: float = 600.0,
) -> Store:
    """Wait for all ranks; return the store for ``init_process_group``.

    Communicates: with rank 0's store, which this call creates on rank 0.

    Args:
        place: the same on all ranks.
        rank: of this process.
        world_size: number of ranks to wait for.
        should_stop: asked about every ``POLL_SECONDS``; True on one rank ends the wait of all.
        wait_seconds: until the wait fails.

    Raises:
        ValueError: there is no such host.
        StoppedWhileWaiting: ``should_stop`` said so, here or on another rank.
        RendezvousFailed: the host could not be looked up, a rank did not come, came twice, or rank
            0 left.
    """
    wait = _Wait(place, rank, world_size, should_stop, wait_seconds)
    _look_up(wait)
    is_host = rank == 0 and not place.is_hosted
    server = _host(place) if is_host else _reach(wait)
    store = PrefixStore(f"{place.prefix}meeting", server)
    try:
        verdict = _agree(wait, store)
        if verdict != GO:
            store.set(f"read/{rank}", "")
    except DistError as error:
        # Rank 0 lingers for those it knows of; this rank may have come in its last moment.
        if should_stop():
            raise StoppedWhileWaiting(f"rank {rank} was asked to stop") from None
        raise RendezvousFailed(
            f"rank {rank} lost the store at {place} while ranks were meeting: rank 0 ended; its "
            f"output says why ({_first_line(error)})"
        ) from None
    if verdict == GO:
        return PrefixStore(f"{place.prefix}default_pg", server)
    if is_host:
        _see_off(store, world_size)
    if verdict.startswith(STOP):
        raise StoppedWhileWaiting(verdict.removeprefix(STOP))
    raise RendezvousFailed(verdict.removeprefix(FAIL), wait.missing)


@dataclass
class _Wait:
    """Who waits, where, and until when; on the rank that gave up, whom it missed."""

    place: MeetingPlace
    rank: int
    world_size: int
    should_stop: Callable[[], bool]
    seconds: float
    started: float = field(default_factory=time.monotonic)
    missing: set[int] = field(default_factory=set)
    notices: WaitNotices = field(default_factory=lambda: WaitNotices(tell, NOTICE_AFTER_SECONDS))

    def is_over(self) -> bool:
        return time.monotonic() - self.started >= self.seconds

    def tell(self, what: Callable[[], str]) -> None:
        """Say what this rank waits for, when it is time."""
        self.notices.look(lambda: f"rank {self.rank} of {self.world_size}: {what()}")


# 1. find the host, reach the store
def _look_up(wait: _Wait) -> None:
    """Wait until the host is known, briefly; rank 0 too, for whom the others would wait in vain."""
    lookup = HostLookup(wait.place)
    lookup.start()
    deadline = wait.started + min(LOOKUP_SECONDS, wait.seconds)
    notices = WaitNotices(tell, first_seconds=1.0)
    try:
        while lookup.is_alive():
            lookup.join(POLL_SECONDS)
            if wait.should_stop():
                raise StoppedWhileWaiting(f"rank {wait.rank} was asked to stop")
            if lookup.is_alive() and time.monotonic() >= deadline:
                raise RendezvousFailed(
                    f"rank {wait.rank} of {wait.world_size} could not look MASTER_ADDR="
                    f"{wait.place.host} up within {deadline - wait.started:g} s: {lookup.problem}. "
                    "Check this machine's name service, or give MASTER_ADDR as an address"
                )
            notices.look(
                lambda: (
                    f"rank {wait.rank} of {wait.world_size}: looking MASTER_ADDR="
                    f"{wait.place.host} up: {lookup.problem}"
                )
            )
    finally:
        lookup.is_wanted = False
    lookup.check()


def _host(place: MeetingPlace) -> TCPStore:
    try:
        # Rank 0 talks to itself over the loopback, whatever MASTER_ADDR says.
        return TCPStore("127.0.0.1", place.port, is_master=True, **_patience())
    except DistError as error:
        raise RendezvousFailed(
            f"rank 0 cannot listen on port {place.port} of {socket.gethostname()}: "
            f"{_first_line(error)}; choose another MASTER_PORT, the same on all ranks"
        ) from None


def _reach(wait: _Wait) -> TCPStore:
    attempt = _Attempt(wait.place)
    attempt.start()
    try:
        while attempt.store is None:
            if wait.should_stop():
                raise StoppedWhileWaiting(f"rank {wait.rank} was asked to stop")
            if attempt.is_foreign():
                raise RendezvousFailed(
                    f"rank {wait.rank} of {wait.world_size} found another program at {wait.place}, "
                    "which does not answer as the store of rank 0; choose another MASTER_PORT, the "
                    "same on all ranks"
                )
            if wait.is_over():
                raise RendezvousFailed(
                    f"rank {wait.rank} of {wait.world_size} did not reach rank 0 at {wait.place} "
                    f"within {wait.seconds:g} s (last attempt: {attempt.problem}). Check that rank "
                    "0 was started and its output shows no error, that it runs on "
                    f"{wait.place.host}, that MASTER_ADDR and MASTER_PORT are the same on all "
                    "ranks, and that no firewall is between them"
                )
            wait.tell(
                lambda: (
                    f"seeking rank 0 at {wait.place}, at most {wait.seconds:g} s; last attempt: "
                    f"{attempt.problem}"
                )
            )
            attempt.join(POLL_SECONDS)
        return attempt.store
    finally:
        attempt.is_wanted = False


class _Attempt(threading.Thread):
    """Tries to connect until it has a store or is no longer wanted."""

    def __init__(self, place: MeetingPlace) -> None:
        super().__init__(daemon=True)  # a foreign server's silence must not keep the process
        self.place = place
        self.store: TCPStore | None = None
        self.problem = "no answer yet"
        self.foreign_since: float | None = None  # another program answers, and nobody else since
        self.is_wanted = True

    def is_foreign(self) -> bool:
        since = self.foreign_since
        return since is not None and time.monotonic() - since >= FOREIGN_SECONDS

    def run(self) -> None:
        while self.is_wanted and self.store is None:
            try:  # quietly, until somebody listens: TCPStore would log every refused attempt
                address = (self.place.host, self.place.port)
                probe_store(*address, PROBE_SECONDS)
                self.store = TCPStore(*address, is_master=False, **_patience())
                continue
            except Exception as error:  # whatever it is, the one who waits reports it
                since = self.foreign_since or time.monotonic()
                self.foreign_since = since if isinstance(error, ForeignServer) else None
                self.problem = _first_line(error)
            time.sleep(POLL_SECONDS)


def _patience() -> dict:
    return {"wait_for_workers": False, "timeout": datetime.timedelta(seconds=STORE_SECONDS)}


# 2. and 3. announce, then wait for the verdict
def _agree(wait: _Wait, store: Store) -> str:
    if store.add(_presence(wait.rank), 1) > 1:
        text = (
            f"two processes came to {wait.place} as rank {wait.rank}; give every rank its own "
            "number, and every job its own MASTER_PORT"
        )
        _decide(store, FAIL + text)
        raise RendezvousFailed(text)  # also when the others were complete without this one
    while True:
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        if wait.should_stop():
            return _decide(store, f"{STOP}rank {wait.rank} was asked to stop")
        if wait.rank == 0 and store.check([_presence(rank) for rank in range(wait.world_size)]):
            return _decide(store, GO)
        if wait.is_over():
            return _decide(store, FAIL + _missing(wait, store))
        if wait.rank == 0 or not store.check([_presence(0)]):  # one speaks for all
            wait.tell(lambda: _waiting_for(wait, store))
        time.sleep(POLL_SECONDS)


def _presence(rank: int) -> str:
    return f"present/{rank}"


def _decide(store: Store, verdict: str) -> str:
    """Return the verdict that stands: this one, or the one that was first."""
    return store.compare_set(VERDICT, "", verdict).decode()


def _present(store: Store, world_size: int) -> set[int]:
    return {rank for rank in range(world_size) if store.check([_presence(rank)])}


def _waiting_for(wait: _Wait, store: Store) -> str:
    missing = set(range(wait.world_size)) - _present(store, wait.world_size)
    return f"waiting at {wait.place} for {rank_names(missing)}, at most {wait.seconds:g} s"


def _missing(wait: _Wait, store: Store) -> str:
    present = _present(store, wait.world_size)
    wait.missing = set(range(wait.world_size)) - present
    missing = rank_names(wait.missing)
    host = f" (rank 0 runs on {socket.gethostname()})" if wait.rank == 0 else ""
    return (
        f"{len(present)} of {wait.world_size} ranks met at {wait.place}{host} within "
        f"{wait.seconds:g} s; missing: {missing}. Check that they were started, that their output "
        "shows no error, that MASTER_ADDR and MASTER_PORT are the same on all ranks, and that "
        f"their nodes reach {wait.place}"
    )


# 4. see the others off
def _see_off(store: Store, world_size: int) -> None:
    """Keep the store until all who came have read the verdict, ``LINGER_SECONDS`` at most."""
    end = time.monotonic() + LINGER_SECONDS
    while time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        if store.check([f"read/{rank}" for rank in _present(store, world_size)]):
            return


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
