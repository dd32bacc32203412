"""How far a run at some layout is from the run of one rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

LIMIT = 1e-5  # relative, over all iterations
COMPARED = {"loss": "loss", "grad_norm": "grad_norm", "val_loss": "val/loss"}
# Made of whole counts, per layer: equal to the last bit unless some token was routed elsewhere.
FLIP_WITNESSES = ("vq/code_perplexity", "moe/expert_load_imbalance")


@dataclass
class Cell:
    """One layout and variant: largest relative differences to one rank, or why there are none."""

    layout: str
    variant: str
    seconds: float
    loss: float | None = None
    grad_norm: float | None = None
    val_loss: float | None = None
    first_flip: int | None = None  # iteration
    before_flip: float | None = None  # largest difference of loss and grad_norm until there
    error: str | None = None

    @property
    def complaint(self) -> str | None:
        """Why this cell is not within ``LIMIT``, or None."""
        if self.error is not None:
            return f"{self.layout} {self.variant}: {self.short_error}"
        beyond = [f"{n} {getattr(self, n):.1e}" for n in COMPARED if getattr(self, n) > LIMIT]
        return f"{self.layout} {self.variant}: {', '.join(beyond)}" if beyond else None

    @property
    def flip_text(self) -> str:
        """Where tokens first went elsewhere, and how equal the runs were until then."""
        if self.first_flip is None:
            return ""
        return f", flip at iteration {self.first_flip} (before it {self.before_flip or 0.0:.1e})"

    @property
    def short_error(self) -> str:
        """What failed (the first line) and why (the last: of a refusal or of a traceback)."""
        lines = [line.strip(" -") for line in self.error.splitlines() if line.strip()]
        return " ".join(dict.fromkeys((lines[0], lines[-1])))[:250]


def counted(record: dict[str, float]) -> dict[str, float]:
    """Return what the record says about where tokens went."""
    return {name: value for name, value in record.items() if name.startswith(FLIP_WITNESSES)}


def compare(cell: Cell, ranks: list[list[dict]], expected: list[dict]) -> None:
    """Fill ``cell`` from the records of every rank and those of one rank.

    Raises:
        ValueError: when they are not the same iterations and metrics, or hold a non-finite number.
    """
    cell.first_flip = min(
        (
            int(theirs["iteration"])
            for records in ranks
            for ours, theirs in zip(records, expected, strict=False)
            if counted(ours) != counted(theirs)
        ),
        default=None,
    )
    for records in ranks:
        if [r["iteration"] for r in records] != [r["iteration"] for r in expected]:
            raise ValueError(f"{len(records)} records, one rank has {len(expected)}")
        for ours, theirs in zip(records, expected, strict=True):
            for name, metric in COMPARED.items():
                if (metric in ours) != (metric in theirs):
                    raise ValueError(f"{metric} of iteration {theirs['iteration']} is missing")
                if metric in theirs:
                    difference = abs(ours[metric] - theirs[metric]) / abs(theirs[metric])
                    if not math.isfinite(difference):
                        raise ValueError(f"{metric} of iteration {theirs['iteration']} not finite")
                    setattr(cell, name, max(getattr(cell, name) or 0.0, difference))
                    if cell.first_flip is not None and theirs["iteration"] < cell.first_flip:
                        cell.before_flip = max(cell.before_flip or 0.0, difference)
    if missing := [name for name in COMPARED if getattr(cell, name) is None]:
        raise ValueError(f"nothing compared for {', '.join(missing)}")
