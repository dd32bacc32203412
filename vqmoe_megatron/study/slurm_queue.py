"""What Slurm's queue holds of a study: the tasks of its arrays, by run index."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess

from vqmoe_megatron.rundir.waiting import told_while_waiting
from vqmoe_megatron.runtime.exit_codes import end_in_words
from vqmoe_megatron.study.study import Study
from vqmoe_megatron.study.study_folder import StudyFolder

SQUEUE_FORMAT = "%F|%K|%T|%j"  # array job id, array index, state, job name
SQUEUE_SECONDS = 60


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
        job_id, _, rest = line.partition("|")
        index, _, rest = rest.partition("|")
        state, _, job = rest.partition("|")
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
