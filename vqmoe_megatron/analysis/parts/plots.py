"""Lines of several models in one panel: over layers, or over the levels of a disturbance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vqmoe_megatron.study.report.plot_style import legend_above, series_colour, series_marker

Line = Sequence[tuple[float, float]]  # points (x, y)
LEGEND_ROW = 0.22  # inches
MAX_NAMED = 21  # lines: three times all colours


def draw_lines(
    axis: Axes, lines: Mapping[str, Line], x_name: str, y_name: str, style: str = "-"
) -> None:
    """Draw one line per name, its colour by its place among the names, of which some may be empty.

    Dashed ones (``style`` of ``--``) are hollow and have no entry in the legend.
    """
    for index, (name, points) in enumerate(lines.items()):
        if points:
            axis.plot(
                *zip(*points, strict=True),
                style,
                color=series_colour(index),
                marker=series_marker(index),
                markersize=5,
                markerfacecolor="white" if style == "--" else None,
                label=name if style == "-" else None,
            )
    axis.set_xlabel(x_name)
    axis.set_ylabel(y_name)


def layer_axis(axis: Axes) -> None:
    """Whole numbers on x."""
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True))


def name_lines(figure: Figure, axes: Sequence[Axes], num_columns: int) -> None:
    """Name the lines above the panels, which keep their height; not those of very many."""
    names = {name for axis in axes for name in axis.get_legend_handles_labels()[1]}
    if len(names) > MAX_NAMED:
        figure.suptitle(f"{len(names)} models, too many to tell apart here: the table names them")
        return
    num_rows = -(-len(names) // num_columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * num_rows)
    legend_above(figure, axes, num_columns)


def mean(values: Sequence[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")
