"""Where and from what a measured result comes: machine, commit, versions of what it ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def provenance() -> dict[str, Any]:
    """Return what every result file of ``benchmarks/`` records about its origin."""
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", "vqmoe_megatron", "recipes"
    )
    return {
        "machine": {
            "processor": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "python": platform.python_version(),
            "system": platform.system(),
        },
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed),
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
    }


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
