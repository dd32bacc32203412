"""One run of a study in this process, which becomes ``vqmoe pretrain`` with the run's overrides.

So it joins srun's or torchrun's world or starts local ranks, and ends with the same exit codes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from vqmoe_megatron.runtime.forked_children import PR_SET_PDEATHSIG
from vqmoe_megatron.study.mlflow_parent import parent_override, point_tags
from vqmoe_megatron.study.planned_run import PlannedRun
from vqmoe_megatron.study.study import Study, load_study_run

STARTER_VARIABLE = "VQMOE_STUDY_PID"  # process id of the ``vqmoe study run`` above, if any
EXIT_REQUEUE = 75


def run_task(path: Path, index: int) -> NoReturn:
    """Train the run with this index; does not return.

    Raises:
        ValueError: before any work: an unknown index, a changed run, another number of ranks.
    """
    _end_with_starter(os.environ)
    study = load_study_run(path, index)
    run = study.runs[index]
    num_launched = launched_ranks(os.environ)
    if num_launched is not None and num_launched != run.num_ranks:
        raise ValueError(
            f"{run.name} of study {path} needs {run.num_ranks} ranks, but {num_launched} were "
            f"started; start {run.num_ranks} tasks (sbatch --ntasks={run.num_ranks})"
        )
    study.check_started()
    arguments = pretrain_arguments(study, run, is_launched=num_launched is not None)
    print(f"{run.name} (index {index} of study {study.file.name})", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "vqmoe_megatron.cli", *arguments])


def pretrain_arguments(study: Study, run: PlannedRun, is_launched: bool) -> list[str]:
    """Return what follows ``vqmoe`` to train ``run`` in a launched world, or on its own ranks."""
    nproc = [] if is_launched else ["--nproc", str(run.num_ranks)]
    uri = run.config.tracking.mlflow_uri
    tags = point_tags(run) if run.config.tracking.mlflow else []
    overrides = [*run.overrides, *tags, *parent_override(study.folder, uri)]
    return ["pretrain", str(study.file.recipe), *nproc, *overrides]


def launched_ranks(environ: Mapping[str, str]) -> int | None:
    """Return the size of the world that torchrun or srun started, None outside of one.

    sbatch itself sets SLURM_NTASKS; only srun sets SLURM_STEP_ID. ``vqmoe pretrain`` judges
    incomplete variables.
    """
    torchrun, slurm = environ.get("WORLD_SIZE"), environ.get("SLURM_NTASKS")
    if torchrun is not None and torchrun.isdigit():
        return int(torchrun)
    if slurm is not None and slurm.isdigit() and "SLURM_STEP_ID" in environ:
        return int(slurm)
    return None


def check_no_world() -> None:
    """Refuse to run a study inside the ranks of a launcher: every rank would run all of it.

    Raises:
        ValueError: naming the world.
    """
    num_launched = launched_ranks(os.environ)
    if num_launched is not None and num_launched > 1:
        raise ValueError(
            f"vqmoe study run was started as {num_launched} ranks; start it once: it starts the "
            "ranks of its runs itself (vqmoe study task is for a launched world)"
        )


def _end_with_starter(environ: Mapping[str, str]) -> None:
    """Have the kernel send SIGTERM when the starting ``vqmoe study run`` dies; survives exec."""
    starter = environ.get(STARTER_VARIABLE)
    if starter is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(starter):  # it died before the call above
        sys.exit(EXIT_REQUEUE)
