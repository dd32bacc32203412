"""Ctrl-C at any moment of a command: one line and exit code 130, no traceback.

A SystemExit, because commands' libraries make messages of their own of a KeyboardInterrupt.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


class Interrupted(SystemExit):
    """SIGINT came; clean-up runs as for every exception."""


@contextmanager
def one_line_interrupt() -> Iterator[None]:
    """Within, SIGINT ends this process so; a second one ends it at once.

    An ignored SIGINT stays ignored, and a handler that is not Python's own stays in place.

    Raises:
        Interrupted: when SIGINT came; it has been said on standard error.
    """
    is_main = threading.current_thread() is threading.main_thread()  # others may set no handler
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    except Interrupted:
        print("interrupted", file=sys.stderr)
        raise
    finally:
        if is_main and signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise Interrupted(INTERRUPTED)
