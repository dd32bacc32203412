"""What a result comes from: the card, its driver, the versions, and the source that ran.

The machine may hold a copy of the tree without its git history. So results are bound
to the source itself, by a digest of the package and its recipes; the commit is told beside it where
git is there, or where the carried wheels were made from the same source.
"""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from vqmoe_megatron.bench.origin import PACKAGE, source_commit

PACKAGES = (
    "torch", "triton", "megatron-core", "transformer-engine", "omegaconf", "numpy", "mlflow",
)  # fmt: skip
RECIPES = PACKAGE.parent / "recipes"


def source_sha256(package: Path = PACKAGE, recipes: Path = RECIPES) -> str:
    """Return the digest of a package's Python files and its recipes, by name and content."""
    files = [*sorted(package.rglob("*.py")), *sorted(recipes.rglob("*.yaml"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(package.parent)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def source_facts(carried: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return ``sha256``, ``commit`` and ``uncommitted_changes`` of the source.

    Args:
        carried: such facts from the machine that made the wheels; they tell the commit where git
            does not, if the source is the same.
    """
    digest = source_sha256()
    commit = source_commit()
    if commit["commit"] is None and carried is not None and carried.get("sha256") == digest:
        commit = {name: carried[name] for name in commit}
    return {"sha256": digest, **commit}


def machine_facts(device: str) -> dict[str, Any]:
    """Return the card (None on the CPU) and the versions, of this process."""
    return {
        "card": card_facts() if device == "cuda" else None,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"python": platform.python_version(), **package_versions()},
    }


def package_versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def card_facts() -> dict[str, Any]:
    """Return name, memory, multiprocessors, compute capability, CUDA and driver of device 0."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": driver_version(),
    }


def driver_version() -> str | None:
    """What nvidia-smi says; None where it is not there."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def in_words(facts: dict[str, Any]) -> str:
    """One line for a page."""
    card = facts.get("card")
    where = "CPU"
    if card is not None:
        gib = card["memory_bytes"] / 2**30
        where = f"{card['name']}, {gib:.0f} GiB, driver {card['driver']}, CUDA {card['cuda']}"
    versions = [f"{name} {text}" for name, text in facts.get("versions", {}).items() if text]
    return f"{where}; {', '.join(versions)}"
