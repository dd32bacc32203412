"""``vqmoe study``: describe a grid of runs in one file, run it here or on Slurm, watch it."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vqmoe_megatron.cli.study_report import report
from vqmoe_megatron.runtime.standard_streams import forgive_lost_output, print_path
from vqmoe_megatron.runtime.table_console import table_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from vqmoe_megatron.study.run_state import RunState
    from vqmoe_megatron.study.study import Study

WATCH_SECONDS = 2.0

study_app = typer.Typer(no_args_is_help=True, help="Run, submit, watch and report scaling studies.")
study_app.command()(report)

StudyPath = Annotated[
    Path,
    typer.Argument(metavar="STUDY", help="YAML study, e.g. recipes/studies/stdlib_experts.yaml"),
]
Index = Annotated[int, typer.Option(min=0, help="index of the run, as vqmoe study list shows it")]


@study_app.callback()
def _study() -> None:
    """Run, submit, watch and report scaling studies."""


@study_app.command("list")
def list_runs(study: StudyPath) -> None:
    """Check a study and list its runs: point, ranks, steps, tokens, parameters.

    Arms are an axis with named overrides, e.g. arm: {smoe: {code_memory.num_rows: 0}, default: {}};
    the report compares them with study.baseline.

    Example: vqmoe study list recipes/studies/stdlib_experts.yaml
    """
    from vqmoe_megatron.study.study import load_study
    from vqmoe_megatron.study.study_table import print_runs

    print_runs(load_study(study), table_console())


@study_app.command()
def run(
    study: StudyPath,
    jobs: Annotated[
        int,
        typer.Option(min=1, help="runs at the same time, which share the cores among their ranks"),
    ] = 1,
    only: Annotated[
        list[str] | None, typer.Option(help="name or index of a run; may be given several times")
    ] = None,
) -> None:
    """Run what is unfinished of a study on this machine, one process per run.

    Started again, it skips finished runs and resumes the others. Exit codes: 0 all finished,
    1 a run failed, 75 stopped on request.

    Example: vqmoe study run recipes/studies/stdlib_experts.yaml --jobs 2
    """
    from vqmoe_megatron.study.local_display import LocalDisplay
    from vqmoe_megatron.study.local_study import LocalStudy
    from vqmoe_megatron.study.mlflow_parent import end_study_parent, open_study_parent
    from vqmoe_megatron.study.run_state import run_state
    from vqmoe_megatron.study.study import load_study
    from vqmoe_megatron.study.study_folder import study_lock
    from vqmoe_megatron.study.study_table import counts
    from vqmoe_megatron.study.study_task import check_no_world

    forgive_lost_output()  # the runs' directories are the results
    check_no_world()
    loaded = load_study(study)
    chosen = loaded.select(only or [])
    loaded.check_corpora()
    loaded.check_started()
    with study_lock(loaded.folder):
        loaded.start()
        console = table_console()
        display = LocalDisplay(console)
        open_study_parent(loaded, display.say)
        local = LocalStudy(loaded, chosen, jobs, display)
        code = local.run()
        is_done = all(run_state(one).is_finished for one in loaded.runs.values())
        outcome = "FINISHED" if is_done else "FAILED" if code == 1 else "KILLED"  # may go on
        end_study_parent(loaded.folder, outcome, display.say)
        display.say(counts(list(local.states.values())))
    raise typer.Exit(code)


@study_app.command()
def task(study: StudyPath, index: Index) -> None:
    """Train one run of a study: in srun's or torchrun's world, or on local ranks of its own.

    Same exit codes as vqmoe pretrain. Made for vqmoe study run and slurm/study.sbatch.

    Example: vqmoe study task recipes/studies/stdlib_experts.yaml --index 3
    """
    from vqmoe_megatron.study.study_task import run_task

    run_task(study, index)


@study_app.command("path")
def run_path(study: StudyPath, index: Index) -> None:
    """Print the directory of one run.

    Example: vqmoe study path recipes/studies/stdlib_experts.yaml --index 3
    """
    from vqmoe_megatron.study.study import load_study_run

    print_path(load_study_run(study, index).runs[index].run_dir)


@study_app.command()
def submit(
    study: StudyPath,
    sbatch_options: Annotated[
        list[str] | None, typer.Argument(help="after --: options for sbatch, they win over ours")
    ] = None,
    max_parallel: Annotated[int, typer.Option(min=1, help="array tasks at the same time")] = 4,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the runs and the commands; submit nothing")
    ] = False,
) -> None:
    """Submit the runs that are neither finished nor queued as a Slurm array.

    Started again after nodes were lost or tasks killed, it submits what is left.

    Example: vqmoe study submit STUDY.yaml --max-parallel 8 -- --partition=gpu --time=4:00:00
    """
    from vqmoe_megatron.study.slurm_array import check_sbatch, sbatch_script
    from vqmoe_megatron.study.study import load_study
    from vqmoe_megatron.study.study_folder import study_lock

    loaded = load_study(study)
    loaded.check_started()
    options = sbatch_options or []
    script = sbatch_script()
    if dry_run:
        _submit(loaded, options, script, max_parallel, dry_run)
        return
    check_sbatch()
    loaded.check_corpora()
    with study_lock(loaded.folder):
        _submit(loaded, options, script, max_parallel, dry_run)


def _submit(
    loaded: Study, options: list[str], script: Path, max_parallel: int, dry_run: bool
) -> None:
    """Ask the queue and submit what it lacks; nobody else may do so in between."""
    from vqmoe_megatron.study.mlflow_parent import end_study_parent, open_study_parent
    from vqmoe_megatron.study.slurm_array import arrays_of, sbatch_command, submit_arrays
    from vqmoe_megatron.study.study_table import counts, submission_table

    states, notice = _states(loaded, must_know_queue=not dry_run)
    if notice:
        print(notice)
    print(counts(list(states.values())))
    queued = [state.slurm for state in states.values() if state.slurm]
    if queued:
        print(f"already in Slurm's queue, not submitted again: {', '.join(queued)}")
    left = [
        index
        for index, state in states.items()
        if state.state not in ("finished", "running", "queued") and not state.slurm
    ]
    if not left:
        print("nothing to submit")
        if not dry_run and all(state.is_finished for state in states.values()):
            end_study_parent(loaded.folder, "FINISHED", print)
        return
    arrays = arrays_of(loaded, left)
    if dry_run:
        console = table_console()
        console.print(submission_table(console, loaded, arrays, states))
        for number, array in enumerate(arrays):
            after = "JOB_ID_OF_THE_ARRAY_BEFORE" if number else None
            command = sbatch_command(loaded, array, script, max_parallel, options, after)
            print(shlex.join(command))
        print("dry run: nothing submitted")
        return
    loaded.start()
    open_study_parent(loaded, print)
    submit_arrays(loaded, arrays, script, max_parallel, options, print)


@study_app.command()
def status(
    study: StudyPath,
    watch: Annotated[bool, typer.Option("--watch", help="until all runs have ended")] = False,
) -> None:
    """Show how the runs of a study are doing, from their directories and Slurm's queue.

    Example: vqmoe study status recipes/studies/stdlib_experts.yaml --watch
    """
    from vqmoe_megatron.study.study import load_study
    from vqmoe_megatron.study.study_table import counts

    loaded, console = load_study(study), table_console()
    if watch:
        states = _watch(loaded, console)
    else:
        states, notice = _states(loaded)
        if notice:
            print(notice)
        console.print(_table(console, loaded, states))
    console.print(counts(list(states.values())))


def _watch(study: Study, console: Console) -> dict[int, RunState]:
    """Show the table again and again until no run is active; in a log, what changed."""
    told = ""

    def look() -> dict[int, RunState]:
        nonlocal told
        states, notice = _states(study)
        if notice and notice != told:
            print(notice)
        told = notice
        return states

    from rich.live import Live

    from vqmoe_megatron.study.study_table import counts

    states = look()
    if console.is_terminal and not console.is_dumb_terminal:
        with Live(_table(console, study, states), console=console, auto_refresh=False) as live:
            while _is_active(study, states):
                time.sleep(WATCH_SECONDS)
                states = look()
                live.update(_table(console, study, states), refresh=True)
        return states
    shown = ""
    while True:
        if (now := counts(list(states.values()))) != shown:
            console.print(now)
            shown = now
        if not _is_active(study, states):
            return states
        time.sleep(WATCH_SECONDS)
        states = look()


def _is_active(study: Study, states: dict[int, RunState]) -> bool:
    """Whether a run is at work, or `vqmoe study run` is between two of them."""
    from vqmoe_megatron.study.study_folder import is_study_locked

    return is_study_locked(study.folder) or any(
        state.state in ("running", "queued") for state in states.values()
    )


def _table(console: Console, study: Study, states: dict[int, RunState]) -> Table:
    from vqmoe_megatron.study.study_table import state_table

    return state_table(
        console, {study.runs[index].name: (index, state) for index, state in states.items()}
    )


def _states(study: Study, must_know_queue: bool = False) -> tuple[dict[int, RunState], str]:
    """The state of every run; without a queue to ask, by directories alone, and a notice of it."""
    from vqmoe_megatron.study.run_state import run_state
    from vqmoe_megatron.study.slurm_array import QueueUnknown, queued_tasks, submitted_jobs

    tasks: dict[int, str] = {}
    notice = ""
    try:
        tasks = queued_tasks(study)
    except QueueUnknown as error:
        if must_know_queue:
            raise ValueError(
                f"Slurm's queue cannot be asked, so nothing was submitted: {error}"
            ) from error
        if submitted_jobs(study.folder):
            notice = f"without Slurm's queue: {error}"
    states = {index: run_state(run, tasks.get(index, "")) for index, run in study.runs.items()}
    return states, notice
