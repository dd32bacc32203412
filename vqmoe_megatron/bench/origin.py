"""Where a measured result comes from: machine, versions, and the commit of the code that ran."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]


def origin() -> dict[str, Any]:
    """Return what every result file begins with: ``machine``, ``versions``, ``commit``."""
    return {
        "machine": {
            "processor": platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": os.getloadavg()[0],
            "python": platform.python_version(),
            "system": platform.system(),
            "gpu": _gpu_name(),
        },
        "versions": {name: version(name) for name in ("torch", "megatron-core")},
        **source_commit(),
    }


def source_commit() -> dict[str, Any]:
    """Return ``commit`` and ``uncommitted_changes``: of the package, or of the recipes beside it.

    Both are None for a copy of the package that is not in a git repository.
    """
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", "../recipes")
    return {
        "commit": commit,
        "uncommitted_changes": None if changed is None else bool(changed),
    }


def commit_in_words(origin: dict[str, Any]) -> str:
    """Return ``3f2ab9c01d4e with uncommitted changes``, of what :func:`origin` found."""
    changed = " with uncommitted changes" if origin["uncommitted_changes"] else ""
    return (origin["commit"] or "unknown")[:12] + changed


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
