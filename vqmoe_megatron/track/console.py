"""What rank 0 shows: a live display on a terminal, plain grep-able lines in a log.

Both are fed the same records as ``metrics.jsonl``; which metrics appear and how they are written
comes from the metric table. ``bits_per_byte`` is derived here from the training loss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text

from vqmoe_megatron.metrics.table import metric_table

LOG_WIDTH = 120  # columns of a table written to a log, where no terminal tells its width


def format_duration(seconds: float) -> str:
    """Return ``1:02:03`` or ``2:03``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class RunConsole:
    """The display of one training run; a context manager that always restores the terminal.

    ``bytes_per_token``: mean bytes one token stands for (1 for bytes), ``None`` when unknown, which
    leaves ``bits_per_byte`` out. ``stream`` decides: a terminal gets the live display.
    """

    def __init__(
        self,
        train_iters: int,
        start_iteration: int = 0,
        bytes_per_token: float | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self.train_iters = train_iters
        self.bytes_per_token = bytes_per_token
        stream = stream or sys.stdout
        is_terminal = stream.isatty()
        self._console = Console(
            file=stream,
            force_terminal=is_terminal,  # a log stays plain even under FORCE_COLOR
            width=None if is_terminal else LOG_WIDTH,
            highlight=False,
        )
        self._live: Live | None = None
        self._shown: dict[str, str] = {}
        self._progress = Progress(
            TextColumn("[bold]iteration {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=self._console,
            expand=True,
        )
        self._task = self._progress.add_task(
            "train", total=train_iters, completed=start_iteration, eta="-"
        )

    def __enter__(self) -> RunConsole:
        """Start the live display when on a terminal that can move its cursor."""
        can_redraw = self._console.is_terminal and not self._console.is_dumb_terminal
        if can_redraw and self._live is None:
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=2,
                vertical_overflow="visible",
            )
            self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore the terminal; exceptions pass through."""
        self.close()

    def close(self) -> None:
        """Stop the live display and show the cursor again; may be called twice."""
        if self._live is not None:
            live, self._live = self._live, None
            live.stop()

    def update(self, record: Mapping[str, float]) -> None:
        """Show one metrics record (it must hold ``iteration``; everything else may be missing)."""
        iteration = int(record["iteration"])
        shown = self._formatted(record)
        if self._live is None:
            values = [f"{name} {text}" for name, text in shown.items()]
            self.message(" | ".join([f"iteration {iteration}/{self.train_iters}", *values]))
            return
        self._shown |= shown
        self._progress.update(self._task, completed=iteration, eta=self._shown.get("eta", "-"))
        validation = [f"{name} {text}" for name, text in shown.items() if name.startswith("val/")]
        if validation:  # rare and worth keeping: written above the display
            self.message(" | ".join([f"iteration {iteration}/{self.train_iters}", *validation]))

    def message(self, text: str) -> None:
        """Print a line, above the live display when there is one; markup is not interpreted."""
        self._console.print(Text(text), soft_wrap=True)

    def table(
        self, title: str, rows: Iterable[Sequence[object]], headers: Sequence[str] = ()
    ) -> None:
        """Print a table of ``rows``, above the live display when there is one."""
        table = Table(title=title, title_justify="left", show_header=bool(headers))
        rows = [[Text(str(cell)) for cell in row] for row in rows]
        for column in range(max([len(headers), *(len(row) for row in rows)])):
            table.add_column(headers[column] if column < len(headers) else "", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def _formatted(self, record: Mapping[str, float]) -> dict[str, str]:
        """Return the console's metrics of a record as text, in the metric table's order."""
        shown: dict[str, str] = {}
        for name, metric in metric_table().items():
            if metric.console_format is not None and record.get(name) is not None:
                shown[name] = format(record[name], metric.console_format) + metric.console_note
            if name == "loss" and "loss" in shown and self.bytes_per_token:
                bits_per_byte = record["loss"] / math.log(2) / self.bytes_per_token
                shown["bits_per_byte"] = format(bits_per_byte, ".4f")
        if record.get("step_time_ms") is not None:
            remaining = max(0, self.train_iters - int(record["iteration"]))
            shown["eta"] = format_duration(remaining * record["step_time_ms"] / 1000)
        return shown

    def _render(self) -> Group:
        """Return the bar and a grid of the latest values, as many columns as the width allows."""
        cells = [
            Text.assemble((f"{name} ", "dim"), (text, "bold"))
            for name, text in self._shown.items()
            if name != "eta"
        ]
        widest = max((cell.cell_len for cell in cells), default=1) + 3
        columns = max(1, min(len(cells), self._console.width // widest))
        grid = Table.grid(padding=(0, 3, 0, 0))
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        return Group(self._progress, grid)
