"""A study in Slurm: an array of the runs that are neither finished nor in the queue, and the queue.

Runs with different numbers of ranks cannot share an array; each number gets its own, one after
another, so that the concurrency limit holds for the study.
"""

from __future__ import annotations

import hashlib
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
from vqmoe_megatron.study.study import Study
from vqmoe_megatron.study.study_folder import StudyFolder

SCRIPT = Path("slurm/study.sbatch")
SBATCH_SECONDS, SQUEUE_SECONDS = 120, 60
SQUEUE_FORMAT = "%F|%K|%T|%j"  # array job id, array index, state, job name
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


class QueueUnknown(Exception):
    """Slurm cannot be asked; the message says why."""


def job_name(study: Study) -> str:
    """Return the name of the study's arrays: its own, and a mark of its directory."""
    place = str(study.folder.path.resolve()).encode()
    return f"{study.file.name}-{hashlib.sha256(place).hexdigest()[:6]}"


def queued_tasks(study: Study) -> dict[int, str]:
    """Return ``{run index: "1234_5 PENDING"}`` of tasks that Slurm holds: waiting, running, ending.

    A task is the study's when its job has the study's own name, or a recorded id and the name it
    was submitted under. An id alone says nothing: a rebuilt cluster counts from 1 again.

    Raises:
        QueueUnknown: no squeue here, or it fails.
    """
    listing = _squeue("--me", "--array", f"--format={SQUEUE_FORMAT}")
    recorded, name = set(submitted_jobs(study.folder)), job_name(study)
    tasks: dict[int, str] = {}
    for line in listing.splitlines():
        job_id, index, state, job = (line.split("|", 3) + ["", "", ""])[:4]
        is_ours = job == name or (job_id, job) in recorded
        if not is_ours or not index.isdigit():
            continue
        if not tasks.get(int(index), "").endswith(" RUNNING"):
            tasks[int(index)] = f"{job_id}_{index} {state}"
    return tasks


def name_in_queue(job_id: str) -> str:
    """Return the name Slurm knows a job by, which sbatch's options or a site's plugin may set.

    Raises:
        QueueUnknown: Slurm cannot be asked, or does not know the job.
    """
    names = _squeue(f"--jobs={job_id}", "--format=%j").splitlines()
    if not names:
        raise QueueUnknown(f"squeue does not list job {job_id}")
    return names[0]


def submitted_jobs(folder: StudyFolder) -> list[tuple[str, str]]:
    """Return job id and job name of the arrays submitted so far, oldest first."""
    try:
        rows = json.loads(folder.slurm_jobs.read_text("utf-8"))
        return [(str(row["job_id"]), str(row["job_name"])) for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{folder.slurm_jobs} is damaged ({error}); without it queued tasks may not be found: "
            "look at squeue, then remove it"
        ) from error


def _squeue(*options: str) -> str:
    if shutil.which("squeue") is None:
        raise QueueUnknown("there is no squeue on PATH")
    command = ["squeue", "--noheader", *options]
    try:
        with told_while_waiting("waiting for squeue"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=SQUEUE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise QueueUnknown(f"squeue: {error}") from error
    if done.returncode:
        raise QueueUnknown(_last_line(done.stderr) or f"squeue {end_in_words(done.returncode)}")
    return done.stdout


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
