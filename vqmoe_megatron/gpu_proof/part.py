"""The parts of the proof, in their order, and what each tells about what it found.

A part is a module with ``run(job)``. It says checks, which pass or fail; rows of tables; and what
it left out for want of time. Whatever it has said is on the disk soon after, so what a part
measured before it failed, or was ended, is not lost.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vqmoe_megatron.rundir.atomic import replace_file

WRITE_SECONDS = 1.0  # at most so often what a part says is written down
MARK = "» "  # of lines that the terminal shows; the rest stays in the part's log


@dataclass(frozen=True)
class Part:
    """One part: ``minutes`` is its share where all parts together have 20."""

    name: str
    module: str
    title: str
    minutes: float


PARTS = (
    Part("correctness", "layer_check", "Layer, kernels and host reads against references", 3.0),
    Part("kernels", "kernels", "Kernels against torch and the roofs of this card", 3.0),
    Part("layer", "layer_times", "Whole layers, and the discrete path as a CUDA graph", 4.0),
    Part("train", "train_run", "A training run: speed, shares, bitwise resume", 3.0),
    Part("study", "study_run", "Loss at equal tokens: SMoE top-1, top-2 and VQMoE", 7.0),
)


def choose_parts(names: str | None) -> tuple[Part, ...]:
    """Return the parts of a comma-separated list in their own order; all of them for None.

    Raises:
        ValueError: for a name that is no part's.
    """
    if names is None:
        return PARTS
    wanted = [name.strip() for name in names.split(",")]
    legal = [part.name for part in PARTS]
    for name in wanted:
        if name not in legal:
            raise ValueError(f"no part {name!r}: choose from {', '.join(legal)}")
    return tuple(part for part in PARTS if part.name in wanted)


@dataclass
class Findings:
    """What a part said, as it stands in its JSON.

    ``checks``: name, passed, text; and figure and limit, where a number was compared.
    ``tables``: rows by title. ``left_out``: what was not done, with its reason. ``error``: in one
    line, then the traceback.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    error: list[str] = field(default_factory=list)


class Job:
    """What a part is given: its size, its time, its folders, and the ways to say what it found."""

    def __init__(
        self, name: str, device: str, is_tiny: bool, seconds: float, work: Path, out: Path
    ) -> None:
        self.name = name
        self.device = device
        self.is_tiny = is_tiny
        self.work = work  # scratch, removed afterwards
        self.out = out  # where the part's own files may go
        self.findings = Findings()
        self._deadline = time.monotonic() + seconds
        self._written = -math.inf

    @property
    def seconds_left(self) -> float:
        """Until the part should have ended; it may be negative."""
        return self._deadline - time.monotonic()

    def say(self, text: str) -> None:
        """Show one line of progress."""
        print(f"{MARK}{self.name}: {text}", flush=True)

    def check(
        self,
        name: str,
        passed: bool,
        text: str = "",
        figure: float | None = None,
        limit: float | None = None,
    ) -> bool:
        """Note whether something holds; a part with one that does not has failed."""
        row: dict[str, Any] = {"name": name, "passed": bool(passed), "text": text}
        if figure is not None:
            row |= {"figure": figure, "limit": limit}
        self.findings.checks.append(row)
        if not passed:
            shown = "" if figure is None else f" {figure:.3g} (limit {limit})"
            self.say(f"FAILED {name}:{shown} {text}")
        self.publish()
        return passed

    def within(self, name: str, figure: float, limit: float, text: str = "") -> bool:
        """Check that a number is at most ``limit``; NaN is not."""
        return self.check(name, figure <= limit, text, figure, limit)

    def row(self, table: str, **values: Any) -> None:
        """Add a row to a table."""
        self.findings.tables.setdefault(table, []).append(values)
        self.publish()

    def leave_out(self, what: str, reason: str) -> None:
        """Note what is not done; a part that left something out is incomplete."""
        self.say(f"left out {what}: {reason}")
        self.findings.left_out.append(f"{what}: {reason}")
        self.publish()

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether so many seconds are left; else note ``what`` as left out."""
        if self.seconds_left > seconds:
            return True
        self.leave_out(what, "no time left")
        return False

    def publish(self, at_once: bool = False) -> None:
        """Write down what was said, unless it was done a moment ago."""
        now = time.monotonic()
        if at_once or now - self._written > WRITE_SECONDS:
            self._written = now
            replace_file(findings_file(self.work), dumped(vars(self.findings)))


def findings_file(work: Path) -> Path:
    """Where a part in ``work`` writes down what it says."""
    return work / "findings.json"


def read_findings(work: Path) -> Findings:
    """Return what a part said before it ended, however it did; nothing when it said nothing."""
    try:
        content = json.loads(findings_file(work).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return Findings()
    return Findings(**content)


def dumped(content: dict[str, Any]) -> str:
    """Return JSON that every reader takes: a number that is not finite becomes a text."""
    return json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(one) for one in value]
    return value
