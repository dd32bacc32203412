"""What ``vqmoe study run`` shows: a live table on a terminal, one plain line per event in a log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from vqmoe_megatron.study.planned_run import PlannedRun
from vqmoe_megatron.study.run_state import RunState, run_state
from vqmoe_megatron.study.study_table import counts, metric_text, num_runs, state_table
from vqmoe_megatron.track.console import format_duration


class LocalDisplay:
    """A context manager that always restores the terminal. Ended runs stay as lines above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._running: dict[str, tuple[int, RunState]] = {}
        self._summary = ""
        self._told_stop = False
        self._live: Live | None = None

    def __enter__(self) -> LocalDisplay:
        """Start the live table where the cursor can be moved."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=2
            )
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the live table; exceptions pass through."""
        if self._live is not None:
            self._running.clear()
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """Print one line, above the live table when there is one."""
        self._console.print(Text(text), soft_wrap=True)

    def started(self, name: str, index: int) -> None:
        """A run was started; a terminal shows it in its table."""
        if self._live is None:
            self.say(f"started {name} (index {index})")

    def progress(self, run: PlannedRun, index: int) -> None:
        """Show how a running run is doing; a log hears of it when it ends."""
        if self._live is not None:
            self._running[run.name] = (index, run_state(run, is_alive=True))

    def ended(self, name: str, index: int, state: RunState, seconds: float, log: Path) -> None:
        """A run ended: one line in any case."""
        self._running.pop(name, None)
        words = [f"{state.state} {name} (index {index})"]
        words.append(f"iteration {state.iteration}/{state.train_iters}")
        words += [f"loss {loss}"] if (loss := metric_text(state, "loss")) else []
        words.append(format_duration(seconds))
        if not state.is_finished:
            words.append(f"{state.reason or 'no reason given'}; log {log}")
        self.say(" | ".join(words))

    def stopping(self, signal_name: str, num_active: int) -> None:
        """A stop signal came: say so once."""
        if not self._told_stop:
            self._told_stop = True
            self.say(f"{signal_name}: {num_runs(num_active)} to save and end; nothing else starts")

    def counts(self, states: Sequence[RunState], num_active: int) -> None:
        """Remember the line under the live table."""
        self._summary = f"{counts(states)}; {num_active} active"

    def _render(self) -> Group:
        return Group(state_table(self._console, dict(self._running)), Text(self._summary))
