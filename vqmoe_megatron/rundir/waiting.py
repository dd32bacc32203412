"""Whoever waits says for what: a line after some seconds, and then now and again.

``WaitNotices`` is for loops that poll, ``told_while_waiting`` for one call that blocks.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

FIRST_NOTICE_SECONDS, NOTICE_SECONDS = 3.0, 30.0
SLOW_SECONDS = 15.0  # for a call that does its work meanwhile


def tell(text: str) -> None:
    """Print a notice on standard error, beside a command's result; a lost console loses it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def tell_nobody(text: str) -> None:
    """Say nothing: another line will."""


class WaitNotices:
    """Notices of one wait; the first after ``first_seconds``, then every ``every_seconds``."""

    def __init__(
        self,
        say: Callable[[str], None] = tell,
        first_seconds: float = FIRST_NOTICE_SECONDS,
        every_seconds: float = NOTICE_SECONDS,
    ) -> None:
        self._say, self._every_seconds = say, every_seconds
        self._started = time.monotonic()
        self._next = self._started + first_seconds

    def look(self, what: Callable[[], str]) -> None:
        """Call it in each round: says ``what()`` and how long it has been, when it is time."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every_seconds
            self._say(f"{what()} ({now - self._started:.0f} s so far)")


@contextlib.contextmanager
def told_while_waiting(what: str, say: Callable[[str], None] = tell) -> Iterator[None]:
    """Say ``what`` now and again, from a thread, while the body runs."""
    is_over = threading.Event()
    notices = WaitNotices(say, SLOW_SECONDS)

    def watch() -> None:
        while not is_over.wait(0.5):
            notices.look(lambda: what)

    threading.Thread(target=watch, name="wait-notices", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()
