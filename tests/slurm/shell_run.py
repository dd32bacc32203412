"""Run a piece of bash that sources files of ``launchers/``, with fake commands where needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def bash(script: str, *sourced: str, cwd: Path | None = None, **environment: str):
    """Run ``script`` after sourcing ``launchers/<name>.sh``; only PATH and ``environment`` are set.

    Returns:
        The ended process, with text output.
    """
    lines = ["set -euo pipefail", *(f"source '{ROOT}/launchers/{name}.sh'" for name in sourced)]
    return subprocess.run(
        ["bash", "-c", "\n".join([*lines, script])],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def fake_command(folder: Path, name: str, body: str) -> None:
    """Put an executable ``name`` into ``folder``."""
    path = folder / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
