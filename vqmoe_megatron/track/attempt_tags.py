"""Tags that tell a run's attempts apart: where each start ran, and from where it went on.

``attempt/02/slurm_job_id`` and so on stay for every attempt; ``attempt`` is the latest's number.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from datetime import datetime, timezone

# Launcher facts, when the environment has them.
ATTEMPT_VARIABLES = (
    "SLURM_JOB_ID",
    "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_NODELIST",
    "SLURM_JOB_NUM_NODES",
    "SLURM_RESTART_COUNT",
)


def attempt_tags(
    number: int, facts: Mapping[str, object], environment: Mapping[str, str]
) -> dict[str, str]:
    """Return the tags of attempt ``number`` (1-based).

    Args:
        number: of this start of the run.
        facts: what the run knows of itself, such as ``from_iteration``.
        environment: of the process; only :data:`ATTEMPT_VARIABLES` are read.
    """
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    every = {"started": started, "host": platform.node(), **facts}
    every |= {name.lower(): environment[name] for name in ATTEMPT_VARIABLES if name in environment}
    tags = {f"attempt/{number:02d}/{name}": str(value) for name, value in every.items()}
    return {"attempt": str(number), **tags}
