"""How a process ended, in words: one rule for ranks, studies, simulations and Slurm's commands."""

from __future__ import annotations

import signal


def end_in_words(code: int) -> str:
    """Return ``ended with exit code 3`` or ``was killed by SIGTERM``.

    ``code``: of ``subprocess``, negative for a signal. SIGKILL is what the kernel ends a process
    with when memory runs out, and who else sends one knows it.
    """
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal between the first and the last has no name
        name = f"signal {-code}"
    return f"was killed by {name}" + (", most likely out of memory" if name == "SIGKILL" else "")
