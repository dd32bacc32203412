"""The table of ``vqmoe study list``: every run of a grid before any has started."""

from __future__ import annotations

from rich.console import Console

from vqmoe_megatron.plan.run_plan import plan_run
from vqmoe_megatron.study.budget import with_vocabulary
from vqmoe_megatron.study.study import Study
from vqmoe_megatron.study.study_table import plain_table


def print_runs(study: Study, console: Console) -> None:
    """Print one row per run: ``flops`` of the whole run, ``active`` parameters of a token.

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
    console.print(f"{len(study.runs)} runs, rule {study.file.rule}; directory {study.folder.path}")
