"""The tracker file of a checkpoints folder, which names the newest checkpoint by its iteration."""

from __future__ import annotations

from pathlib import Path

from vqmoe_megatron.rundir.file_names import CHECKPOINTS_DIR, TRACKER_FILE


def tracker_text(tracker: Path) -> str:
    """Return what stands at the beginning of a tracker file; ``OSError`` when it cannot be read."""
    with tracker.open("rb") as file:
        return file.read(80).decode(errors="replace").strip()


def named_iteration(text: str) -> int | None:
    """Return the iteration that a tracker's text names; None when it is no number."""
    return int(text) if text.isascii() and text.isdigit() else None


def saved_iteration(run_dir: Path) -> int:
    """Return the newest checkpoint's iteration; 0 where no tracker of the run names one."""
    try:
        return named_iteration(tracker_text(run_dir / CHECKPOINTS_DIR / TRACKER_FILE)) or 0
    except OSError:
        return 0
