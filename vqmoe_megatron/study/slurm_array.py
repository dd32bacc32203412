"""Submitting a study: one Slurm array of the runs that are neither finished nor in the queue.

Runs with different numbers of ranks cannot share an array; each number gets its own, one after
another, so that the concurrency limit holds for the study.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import vqmoe_megatron
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.waiting import told_while_waiting
from vqmoe_megatron.runtime.exit_codes import end_in_words
from vqmoe_megatron.study.slurm_queue import QueueUnknown, job_name, name_in_queue
from vqmoe_megatron.study.study import Study

SCRIPT = Path("slurm/study.sbatch")
SBATCH_SECONDS = 120
SLURM_SETTINGS = ("SLURM_CONF", "SLURM_CLUSTERS")  # a user's, not a job's; as in slurm/submit.sh


@dataclass(frozen=True)
class Array:
    """One call of sbatch."""

    indices: tuple[int, ...]
    num_ranks: int


def arrays_of(study: Study, indices: Iterable[int]) -> list[Array]:
    """Group runs by their number of ranks, fewest ranks first."""
    by_ranks: dict[int, list[int]] = {}
    for index in sorted(indices):
        by_ranks.setdefault(study.runs[index].num_ranks, []).append(index)
    return [Array(tuple(group), num_ranks) for num_ranks, group in sorted(by_ranks.items())]


def sbatch_script() -> Path:
    """Return ``slurm/study.sbatch`` of the working directory, else of the repository.

    Raises:
        ValueError: when neither is there.
    """
    beside_package = Path(vqmoe_megatron.__file__).resolve().parents[1] / SCRIPT
    for script in (SCRIPT, beside_package):
        if script.is_file():
            return script
    raise ValueError(
        f"{SCRIPT} is neither in the working directory nor at {beside_package}; it comes with the "
        "repository: submit from a clone of it"
    )


def sbatch_command(
    study: Study,
    array: Array,
    script: Path,
    max_parallel: int,
    options: Sequence[str],
    after: str | None = None,
) -> list[str]:
    """Return the command for one array; ``options`` of the user come last, so they win.

    ``after``: the job id of the array that must have ended before.
    """
    dependency = [] if after is None else [f"--dependency=afterany:{after}"]
    return [
        "sbatch",
        "--parsable",
        f"--job-name={job_name(study)}",
        f"--array={index_ranges(array.indices)}%{max_parallel}",
        f"--ntasks={array.num_ranks}",
        f"--output={str(study.folder.logs).replace('%', '%%')}/slurm-%A_%a.log",
        "--open-mode=append",
        *dependency,
        *options,
        str(script),
        str(study.folder.study_copy),
    ]


def index_ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as Slurm writes them: ``0-3,7``."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in ranges)


def submit_arrays(
    study: Study,
    arrays: Sequence[Array],
    script: Path,
    max_parallel: int,
    options: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Call sbatch for every array and record each job id before the next.

    Raises:
        ValueError: what sbatch refuses, in its own words.
    """
    after: str | None = None
    for array in arrays:
        command = sbatch_command(study, array, script, max_parallel, options, after)
        say(shlex.join(command))
        try:
            with told_while_waiting("waiting for sbatch"):
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    timeout=SBATCH_SECONDS,
                    env=_without_our_job(os.environ),
                )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"sbatch did not answer in {SBATCH_SECONDS} s; look at squeue before trying again"
            ) from error
        if done.returncode:
            why = done.stderr.strip() or f"it {end_in_words(done.returncode)}"
            raise ValueError(f"sbatch refused the array: {why}")
        after = done.stdout.strip().splitlines()[-1].split(";")[0]  # ID or ID;cluster
        _record(study, after, array, say)
        say(
            f"submitted job {after}: {len(array.indices)} runs of {array.num_ranks} "
            f"rank{'s' if array.num_ranks != 1 else ''}, at most {max_parallel} at a time"
        )


def _without_our_job(environ: Mapping[str, str]) -> dict[str, str]:
    """Leave out the variables of a job that we run in, which sbatch would hand on to the tasks."""
    return {
        name: value
        for name, value in environ.items()
        if not name.startswith("SLURM_") or name in SLURM_SETTINGS
    }


def check_sbatch() -> None:
    """Raise ``ValueError`` where there is no sbatch."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "there is no sbatch on PATH, so nothing was submitted; submit from a Slurm login node, "
            "start a cluster on this machine with slurm/cluster/up.sh, or use vqmoe study run"
        )


def _record(study: Study, job_id: str, array: Array, say: Callable[[str], None]) -> None:
    file = study.folder.slurm_jobs
    try:
        name = name_in_queue(job_id)
    except QueueUnknown as error:
        name = job_name(study)
        say(f"Slurm does not tell the name of job {job_id}, recorded as {name}: {error}")
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    row = {"job_id": job_id, "job_name": name, "indices": list(array.indices)}
    replace_file(file, json.dumps([*rows, row | {"num_ranks": array.num_ranks}], indent=1) + "\n")
