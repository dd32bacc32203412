"""What sections of a report share: drawings as plots with their captions, the words for seeds."""

from __future__ import annotations

import io
from collections.abc import Iterable

from matplotlib.figure import Figure

from vqmoe_megatron.study.report.intervals import SeedMean
from vqmoe_megatron.study.report.page import Plot

DPI = 130
POOLED = (
    "95% t-intervals of the mean over seeds; the standard deviation over seeds is pooled over the "
    "points of a curve, which takes it to be the same at all of them"
)


def plot_or_reason(name: str, drawn: Figure | str, caption: str) -> tuple[list[Plot], list[str]]:
    """Return the plot as PNG, or the sentence that says why there is none."""
    if isinstance(drawn, str):
        return [], [f"No plot {name}: {drawn}."]
    stream = io.BytesIO()
    drawn.savefig(stream, format="png", dpi=DPI)
    return [Plot(name, stream.getvalue(), caption.split(".")[0], caption)], []


def seeds_of(means: Iterable[SeedMean]) -> str:
    """Return ``n = 2``, or the range over the means that a plot draws."""
    counts = sorted({mean.num_seeds for mean in means})
    if not counts:
        return "none measured"
    return f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
