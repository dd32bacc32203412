"""One set-up of the console that commands print their tables on: a terminal, or a log."""

from __future__ import annotations

import sys
from typing import TextIO

from rich.console import Console

LOG_WIDTH = 220  # columns where no terminal tells its width; the longest line of a table fits


def table_console(stream: TextIO | None = None) -> Console:
    """Return a console on ``stream`` (standard output): colours on a terminal, else plain text.

    Text is printed as it is: paths and lists hold brackets, which are no markup.
    """
    stream = stream or sys.stdout
    is_terminal = stream.isatty()
    return Console(
        file=stream,
        force_terminal=is_terminal,  # a file stays plain even under FORCE_COLOR
        width=None if is_terminal else LOG_WIDTH,
        highlight=False,
        markup=False,
    )
