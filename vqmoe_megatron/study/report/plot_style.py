"""What the plots of a report have in common: colours, axes of experts, how a prediction looks.

Measured points are filled and joined by solid lines; planned or predicted ones are hollow and
dashed. Colours are Okabe and Ito's for series, ``viridis`` by size for numbers of experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    NullFormatter,
    NullLocator,
)

from vqmoe_megatron.study.report.intervals import SeedMean

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#555555"
PANEL_HEIGHT = 3.9  # inches
PANEL_WIDTHS = (7.6, 5.5, 4.4)  # of one, two and three in a row, so that letters stay of one size
LEGEND_LINE_INCHES = 0.21  # of one entry in the size of legend_outside
DODGE = 0.05  # octaves between series at the same number of experts
Colour = tuple[float, ...] | str


@contextmanager
def report_style() -> Iterator[None]:
    """Fonts and spines of every plot."""
    settings = {
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "0.9",
        "axes.axisbelow": True,
        "legend.frameon": False,
        "figure.facecolor": "white",
    }
    with matplotlib.rc_context(settings):
        yield


def panels(num_panels: int, share_y: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure with ``num_panels`` axes in rows of at most three; spare ones are removed."""
    num_columns = min(3, num_panels)
    num_rows = -(-num_panels // num_columns)
    width = PANEL_WIDTHS[num_columns - 1] * num_columns
    figure = Figure(figsize=(width, PANEL_HEIGHT * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=share_y).flatten()
    for axis in grid[num_panels:]:
        axis.remove()
    return figure, list(grid[:num_panels])


def series_colour(index: int) -> Colour:
    """The colour of the ``index``-th series; after seven they begin again, with other markers."""
    return OKABE_ITO[index % len(OKABE_ITO)]


def series_marker(index: int) -> str:
    """The marker of the ``index``-th series."""
    return MARKERS[(index + index // len(OKABE_ITO)) % len(MARKERS)]


def size_colours(sizes: Iterable[int]) -> dict[int, Colour]:
    """A colour per number of experts, equally far apart, the palest end left out."""
    ordered = sorted(set(sizes))
    places = np.linspace(0.0, 0.85, max(2, len(ordered)))
    return {
        size: matplotlib.colormaps["viridis"](float(place))
        for size, place in zip(ordered, places, strict=False)
    }


def dodged(sizes: Sequence[float], index: int, num_series: int) -> np.ndarray:
    """Shift ``sizes`` by a few hundredths of an octave, so that error bars do not cover others."""
    return np.asarray(sizes, dtype=float) * 2 ** (DODGE * (index - (num_series - 1) / 2))


def doubling_axis(axis: Axes, values: Iterable[float], name: str) -> None:
    """Make x logarithmic to base 2 with whole-number ticks at the values that occur."""
    ticks = sorted(set(values))
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_locator(FixedLocator(_thinned(ticks)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_locator(NullLocator())
    if ticks:
        axis.set_xlim(ticks[0] / 2**0.4, ticks[-1] * 2**0.4)
    axis.set_xlabel(name)


def _thinned(ticks: list[float]) -> list[float]:
    """At most ten of the ticks, the last among them."""
    step = -(-len(ticks) // 10)
    return ticks[::-1][:: max(1, step)][::-1]


def loss_axis(axis: Axes, name: str = "validation loss (nats/token)") -> None:
    """Make y logarithmic with plain numbers, as losses span far less than a decade."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    step = 10 ** np.floor(np.log10(max(high - low, 1e-9) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 7)
    ticks = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    decimals = max(0, int(np.ceil(-np.log10(step) - 1e-9)))
    axis.yaxis.set_major_locator(FixedLocator(ticks))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.{decimals}f}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylabel(name)


def decade_axis(axis: Axes, name: str) -> None:
    """Make x logarithmic to base 10, labelled at the decades or, within two, at 1, 2 and 5."""
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    is_short = high / low < 100
    axis.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if is_short else (1.0,)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: scientific(value)))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel(name)


def speed_axis(axis: Axes, values: Iterable[float]) -> None:
    """Make y begin at 0, or logarithmic where ``values`` are above 0 and span more than a factor
    of 8; a bar that reaches 0 then ends at the frame."""
    ordered = sorted(values)
    if ordered and ordered[0] > 0 and ordered[-1] / ordered[0] > 8:
        axis.set_yscale("log", nonpositive="clip")
        axis.set_ylim(ordered[0] / 2, ordered[-1] * 2)
        axis.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(EngFormatter(sep=""))


def scientific(value: float) -> str:
    """2000000 as 2x10^6 in mathtext."""
    exponent = int(np.floor(np.log10(value) + 1e-9))
    factor = value / 10**exponent
    power = f"10^{{{exponent}}}"
    return f"${power}$" if abs(factor - 1) < 1e-6 else f"${factor:.3g}\\times{power}$"


def draw_measured(
    axis: Axes, places: Sequence[float], means: Iterable[SeedMean], index: int, **style: object
) -> None:
    """Draw means over seeds of the ``index``-th series with their intervals, filled and solid."""
    means = list(means)
    axis.errorbar(
        places,
        [mean.mean for mean in means],
        [mean.half_width or 0.0 for mean in means],
        color=series_colour(index),
        marker=series_marker(index),
        capsize=3,
        **style,
    )


def draw_planned(
    axis: Axes, places: Sequence[float], values: Iterable[float], index: int, **style: object
) -> None:
    """Draw what the plan says of the ``index``-th series, hollow and dashed."""
    axis.plot(
        places,
        list(values),
        "--",
        color=series_colour(index),
        marker=series_marker(index),
        markerfacecolor="white",
        **style,
    )


def legend_above(figure: Figure, axes: Iterable[Axes], num_columns: int) -> None:
    """Put one legend of all panels above them, every label once."""
    entries = {
        text: handle
        for axis in axes
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=num_columns)


def legend_outside(axis: Axes, title: str | None = None) -> None:
    """Put the legend beside the axis, where it covers nothing; a long one heightens the figure."""
    legend = axis.legend(title=title, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=9.5)
    needed = LEGEND_LINE_INCHES * (len(legend.get_texts()) + 2 + bool(title))
    axis.figure.set_figheight(max(axis.figure.get_figheight(), needed))
