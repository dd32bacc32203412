"""What a benchmark is doing, on standard error: a live line on a terminal, else now and then one.

Lines of the result stay alone on standard output. Nothing is drawn while an action is timed: there
is no thread, the line moves when it is told what is done next.
"""

from __future__ import annotations

import sys

from rich.live import Live
from rich.text import Text

from vqmoe_megatron.rundir.waiting import WaitNotices, tell
from vqmoe_megatron.runtime.table_console import table_console

REDRAW_SECONDS = 0.25


class Progress:
    """A context manager that always restores the terminal; outside of it there is no live line.

    ``stage`` is what all that is done belongs to, ``2 of 6: `` for instance.
    """

    def __init__(self) -> None:
        self.stage = ""
        self._live: Live | None = None
        self._notices = WaitNotices()

    def __enter__(self) -> Progress:
        """Start the live line where the cursor can be moved."""
        console = table_console(sys.stderr)
        if console.is_terminal and not console.is_dumb_terminal:
            self._notices = WaitNotices(self.show, 0, REDRAW_SECONDS)
            self._live = Live(
                console=console,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,  # the result is not for the console of the live line
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Wipe the live line; exceptions pass through."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def look(self, what: str) -> None:
        """Tell what is done next, as often as there is something new: shown when it is time."""
        self._notices.look(lambda: self.stage + what)

    def show(self, text: str) -> None:
        """Show one line at once, in the place of the live one."""
        if self._live is None:
            tell(text)
        else:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def say(self, text: str) -> None:
        """Print a line of the result, above the live line."""
        if self._live is not None:
            self._live.stop()
        print(text, flush=True)
        if self._live is not None:
            self._live.start()
