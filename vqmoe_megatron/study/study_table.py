"""The tables of ``vqmoe study``: the runs of a grid, and how they are doing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vqmoe_megatron.metrics.table import lookup_metric
from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.study.budget import with_vocabulary
from vqmoe_megatron.study.run_state import STATES, RunState
from vqmoe_megatron.study.slurm_array import Array
from vqmoe_megatron.study.study import Study

STATE_STYLES = {
    "finished": "green",
    "running": "bold cyan",
    "queued": "cyan",
    "stopped": "yellow",
    "failed": "bold red",
    "lost": "red",
    "waiting": "dim",
}


def plain_table(console: Console, *columns: str, numbers: Sequence[str] = ()) -> Table:
    """Return an empty table; the columns named in ``numbers`` are right-aligned."""
    table = Table(box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in columns:
        is_number = column in numbers
        table.add_column(
            column, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold"
        )
    return table


def print_runs(study: Study, console: Console) -> None:
    """Print one row per run of a grid, before any has started: ``flops`` of the whole run,
    ``active`` parameters of a token.

    Without its corpus a model's vocabulary, and so its size, is unknown; that is said.
    """
    axes = [axis.name for axis in study.file.axes]
    numbers = ("index", "ranks", "steps", "tokens", "flops", "parameters", "active")
    table = plain_table(console, "index", "run", *axes, *numbers[1:], numbers=numbers)
    unknown = ""
    for index, run in study.runs.items():
        counted = ["", "", ""]
        try:
            plan = plan_run(with_vocabulary(run.config), run.num_ranks)
            flops = f"{run.num_tokens * plan.flops_per_token:.3e}"
            counted = [flops, f"{plan.parameters.total:,}", f"{plan.parameters.active:,}"]
        except ValueError as error:
            unknown = str(error)
        point = [str(run.point[axis]) for axis in axes]
        steps, tokens = run.config.train.train_iters, run.num_tokens
        row = [str(index), run.name, *point, str(run.num_ranks), f"{steps:,}", f"{tokens:,}"]
        table.add_row(*row, *counted)
    console.print(table)
    if unknown:
        console.print(f"sizes are not known: {unknown}")
    if study.file.baselines:
        console.print(f"compared with {', '.join(study.file.baselines)}, paired by seed")
    console.print(f"{len(study.runs)} runs, rule {study.file.rule}; directory {study.folder.path}")


def state_table(console: Console, states: Mapping[str, tuple[int, RunState]]) -> Table:
    """Return one row per run: ``states`` holds (index, state) by name."""
    has_slurm = any(state.slurm for _, state in states.values())
    numbers = ("index", "iteration", "loss", "val/loss", "tokens/s")
    slurm = ("slurm",) if has_slurm else ()
    table = plain_table(
        console, "index", "run", "state", *numbers[1:], *slurm, "reason", numbers=numbers
    )
    for name, (index, state) in states.items():
        shown = [
            f"{state.iteration}/{state.train_iters}",
            metric_text(state, "loss"),
            metric_text(state, "val/loss"),
            metric_text(state, "tokens_per_second"),
        ]
        word = Text(state.state, STATE_STYLES[state.state])
        reason = state.reason if state.state in ("failed", "stopped", "lost") else ""
        task = (state.slurm,) if has_slurm else ()
        table.add_row(str(index), name, word, *shown, *task, Text(reason))
    return table


def submission_table(
    console: Console, study: Study, arrays: Sequence[Array], states: Mapping[int, RunState]
) -> Table:
    """Return one row per run that would be submitted, in the order of the arrays."""
    numbers = ("index", "ranks", "iteration")
    table = plain_table(console, "index", "run", "state", *numbers[1:], numbers=numbers)
    for array in arrays:
        for index in array.indices:
            state = states[index]
            progress = f"{state.iteration}/{state.train_iters}"
            name = study.runs[index].name
            table.add_row(str(index), name, state.state, str(array.num_ranks), progress)
    return table


def metric_text(state: RunState, name: str) -> str:
    """Return a metric as the metric table writes it; nothing when it was never logged."""
    value = state.metrics.get(name)
    return "" if value is None else format(value, lookup_metric(name).console_format or "")


def counts(states: Sequence[RunState]) -> str:
    """Return ``24 runs: 20 finished, 2 failed, 2 waiting``."""
    number = Counter(state.state for state in states)
    listed = ", ".join(f"{number[name]} {name}" for name in STATES if number[name])
    return f"{num_runs(len(states))}: {listed}"


def num_runs(number: int) -> str:
    """Return ``1 run`` or ``3 runs``."""
    return f"{number} run{'s' if number != 1 else ''}"
