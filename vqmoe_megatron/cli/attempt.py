"""``vqmoe attempt``: what a job script asks at the start and at the end of an attempt.

Needs no torch, no network and no world: it reads the run directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vqmoe_megatron.rundir import attempts

attempt_app = typer.Typer(
    no_args_is_help=True, help="Decide for a job script whether an attempt may run, and run again."
)

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="the run's train.output_dir")]
Job = Annotated[str, typer.Option(help="the job, as its status names it: 40, or 40_3 in an array")]
Restart = Annotated[int, typer.Option(min=0, help="how often it was started again")]
MaxRestarts = Annotated[int, typer.Option(min=0, help="VQMOE_MAX_RESTARTS")]


@attempt_app.command()
def begin(
    run_dir: RunDir,
    job: Job,
    restart: Restart,
    max_restarts: MaxRestarts,
    max_idle_attempts: Annotated[int, typer.Option(min=0, help="VQMOE_MAX_IDLE_ATTEMPTS")],
) -> None:
    """Note in slurm_attempts.tsv that an attempt starts, unless it must not.

    Prints one line: "begin ITERATION MARK", to be handed to decide, or "give-up REASON".

    Exits: 0 answered, whatever the answer; 2 usage, or a directory that cannot be written.

    Example: vqmoe attempt begin RUN --job 7 --restart 0 --max-restarts 9 --max-idle-attempts 3
    """
    attempt = attempts.Attempt(run_dir, job, restart, max_restarts)
    print(attempts.begin_attempt(attempt, max_idle_attempts))


@attempt_app.command()
def decide(
    run_dir: RunDir,
    job: Job,
    restart: Restart,
    max_restarts: MaxRestarts,
    iteration: Annotated[int, typer.Option(min=0, help="ITERATION that begin printed")],
    mark: Annotated[str, typer.Option(help="MARK that begin printed")],
) -> None:
    """Decide on status.json and the newest checkpoint what follows when the ranks have ended.

    Prints one line: "done REASON", "requeue REASON" or "give-up REASON". Changes nothing.

    Exits: 0 answered, whatever the answer; 2 usage.

    Example: vqmoe attempt decide RUN --job 7 --restart 0 --max-restarts 9 --iteration 0 --mark none
    """
    attempt = attempts.Attempt(run_dir, job, restart, max_restarts)
    print(attempts.decide_requeue(attempt, attempts.Start(iteration, mark)))
