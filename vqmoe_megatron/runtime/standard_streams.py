"""Standard output and error that never end a command: neither by their characters nor by their end.

1. A character that the encoding lacks becomes ``?``; a byte of a file name that is no character is
   written as it is.
2. What cannot be written (the reader is gone, the disk is full, the terminal hung up) is dropped,
   and the command goes on. :func:`lost_output` says so at its end.
3. A reader that does not read (a pager, Ctrl-S) is waited for, unless :func:`forgive_lost_output`
   was called: other ranks wait for this one, and their patience is limited.

The descriptors 1 and 2 are wrapped below Python's buffers, so this holds for ``print``, rich,
warnings and the interpreter's last flush alike.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from typing import TextIO

ON_ENCODING_ERROR = "vqmoe_readable"
PATIENCE_SECONDS = 10.0  # with a reader that does not read; much less than collectives have
_streams: dict[str, _Descriptor] = {}


def protect_standard_streams() -> None:
    """Put the protection under ``sys.stdout`` and ``sys.stderr``; call once, first of all.

    A stream that somebody has replaced (a test, an embedding program) is left alone.
    """
    _open_closed_descriptors()
    codecs.register_error(ON_ENCODING_ERROR, _readable)
    for name in ("stdout", "stderr"):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is original:
            _streams[name] = _Descriptor(1 if name == "stdout" else 2, f"<{name}>")
            setattr(sys, name, _text_stream(_streams[name], stream))


def forgive_lost_output() -> None:
    """From now on lost output is no failure: for a command whose results are files."""
    for descriptor in _streams.values():
        descriptor.is_needed = False


def lost_output() -> OSError | None:
    """Flush standard output; return why some of it was lost, if that is a failure.

    A reader that ended has what it wanted, as in ``vqmoe plan RECIPE | head``.
    """
    if sys.stdout is not None:
        sys.stdout.flush()
    stdout = _streams.get("stdout")
    if stdout is None or not stdout.is_needed or stdout.problem is None:
        return None
    return None if stdout.problem.errno == errno.EPIPE else stdout.problem


def print_path(path: str | os.PathLike[str]) -> None:
    """Print a path for a program to read: its bytes, whatever the encoding of the output."""
    sys.stdout.flush()
    buffer = getattr(sys.stdout, "buffer", None)
    if buffer is None:  # replaced by something that takes text only
        print(path)
        return
    buffer.write(os.fsencode(path) + b"\n")
    buffer.flush()


class _Descriptor(io.RawIOBase):
    """Writes to a file descriptor and takes what cannot be written for written."""

    def __init__(self, number: int, name: str) -> None:
        self._number = number
        self.name = name
        self.problem: OSError | None = None
        self.is_needed = True
        self._has_stalled = False

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        """Write a part that a ready pipe takes without blocking; the caller asks for the rest."""
        try:
            while self._is_ready():
                with contextlib.suppress(BlockingIOError):  # another process was faster
                    return os.write(self._number, data[: select.PIPE_BUF])
        except OSError as error:
            self.problem = error
        return len(data)

    def _is_ready(self) -> bool:
        patience = None if self.is_needed else 0.0 if self._has_stalled else PATIENCE_SECONDS
        self._has_stalled = not select.select([], [self._number], [], patience)[1]
        return not self._has_stalled


def _text_stream(descriptor: _Descriptor, original: TextIO | None) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(descriptor),
        encoding=getattr(original, "encoding", None) or "utf-8",
        errors=ON_ENCODING_ERROR,
        # PYTHONUNBUFFERED writes through to a raw file; ours has a buffer, for its partial writes.
        line_buffering=any(
            getattr(original, kind, False) for kind in ("line_buffering", "write_through")
        ),
    )


def _open_closed_descriptors() -> None:
    """Give descriptors 0 to 2 to /dev/null where they are closed.

    The next file opened would get such a number, and with it what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """The error handler of 1.; a lone surrogate U+DC80..U+DCFF stands for the byte 0x80..0xFF."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    is_byte = "\udc80" <= character <= "\udcff"
    return bytes([ord(character) - 0xDC00]) if is_byte else "?", error.start + 1
