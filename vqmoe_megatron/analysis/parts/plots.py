"""Lines of several models in one panel: over layers, or over the levels of a disturbance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vqmoe_megatron.study.report.plot_style import series_colour, series_marker

Line = Sequence[tuple[float, float]]  # points (x, y)


def draw_lines(axis: Axes, lines: Mapping[str, Line], x_name: str, y_name: str) -> None:
    """Draw one line per name, in the colours of the report; equal places in equal colours."""
    for index, (name, points) in enumerate(lines.items()):
        if points:
            xs, ys = zip(*points, strict=True)
            axis.plot(
                xs, ys, color=series_colour(index), marker=series_marker(index), ms=5, label=name
            )
    axis.set_xlabel(x_name)
    axis.set_ylabel(y_name)


def layer_axis(axis: Axes) -> None:
    """Whole numbers on x."""
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
