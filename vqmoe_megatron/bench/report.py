"""Results as a table on the terminal, as JSON, as Markdown with ratios, and as a bar plot.

A ratio is a row's figure over that of the reference arm at the same sizes, routing, layout and
pass, measured in the same run. Rows that lose stay.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
BLUE, GREY = "#0072B2", "#666666"
BARS_PER_ROW = 2  # panels beside each other


@dataclass(frozen=True)
class Layout:
    """How one benchmark is shown."""

    title: str
    figure: str  # the measured field that ratios are of
    reference_arm: str
    keys: tuple[str, ...]  # fields that name the sizes of a row
    figures: tuple[str, ...]  # further measured fields


@dataclass(frozen=True)
class Outputs:
    """Files to write, None for none."""

    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None

    def __post_init__(self) -> None:
        for file in (self.json, self.markdown, self.plot):
            if file is not None and not file.resolve().parent.is_dir():
                raise ValueError(f"{file}: its directory does not exist")
        if self.plot is not None and self.plot.suffix != ".png":
            raise ValueError(f"--plot {self.plot}: the plot is a PNG, name it {self.plot.stem}.png")


def ratios(rows: Sequence[Row], layout: Layout) -> list[float | None]:
    """Return each row's ratio to the reference arm; None where either is missing or zero."""

    def key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in layout.keys)

    references = {
        key(row): row[layout.figure] for row in rows if row["arm"] == layout.reference_arm
    }
    found = []
    for row in rows:
        reference, value = references.get(key(row)), row[layout.figure]
        found.append(value / reference if reference and value is not None else None)
    return found


def show(rows: Sequence[Row], layout: Layout, console: Console) -> None:
    """Print the table."""
    headings, lines = _cells(rows, layout)
    table = Table(title=layout.title, caption=_common(rows, layout))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("arm", "what") else "right")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def write(rows: Sequence[Row], layout: Layout, origin: Row, outputs: Outputs) -> None:
    """Write the files that were asked for."""
    if outputs.json is not None:
        whole = {**origin, "benchmark": layout.title, "rows": list(rows)}
        _replace(outputs.json, lambda file: file.write_text(json.dumps(whole, indent=2) + "\n"))
    if outputs.markdown is not None:
        text = markdown(rows, layout, origin)
        _replace(outputs.markdown, lambda file: file.write_text(text))
    if outputs.plot is not None:
        _replace(outputs.plot, lambda file: draw(rows, layout, file))


def _replace(file: Path, fill: Callable[[Path], object]) -> None:
    """Fill ``file`` whole or leave it as it was: an earlier result may lie there."""
    partial = file.with_name(f".{file.stem}.partial{file.suffix}")
    try:
        fill(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def markdown(rows: Sequence[Row], layout: Layout, origin: Row) -> str:
    """Return the table with its origin."""
    machine, versions = origin["machine"], origin["versions"]
    headings, lines = _cells(rows, layout)
    changed = " with uncommitted changes" if origin["uncommitted_changes"] else ""
    commit = (origin["commit"] or "unknown")[:12]
    return "\n".join(
        [
            f"# {layout.title}",
            "",
            f"`ratio`: {layout.figure} over that of arm {layout.reference_arm} in the same run.",
            f"All rows: {_common(rows, layout) or 'nothing in common'}.",
            f"{machine['cores']} cores ({machine['processor']}), GPU: {machine['gpu'] or 'none'},",
            f"load {machine['load_average']:.1f} at the start, Python {machine['python']}, "
            f"torch {versions['torch']}, megatron-core {versions['megatron-core']}, "
            f"commit {commit}{changed}.",
            "",
            f"| {' | '.join(headings)} |",
            "|" + "---|" * len(headings),
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
        ]
    )


def _cells(rows: Sequence[Row], layout: Layout) -> tuple[list[str], list[list[str]]]:
    keys = _varying(rows, layout)
    headings = ["arm", "what", *keys, layout.figure, "ratio", *layout.figures]
    lines = []
    for row, ratio in zip(rows, ratios(rows, layout), strict=True):
        fields = [row["arm"], row["text"], *(row[name] for name in keys)]
        measured = [row[layout.figure], ratio, *(row[name] for name in layout.figures)]
        lines.append([_text(value) for value in (*fields, *measured)])
    return headings, lines


def _varying(rows: Sequence[Row], layout: Layout) -> list[str]:
    """Keys that tell rows apart, in their order."""
    return [name for name in layout.keys if len({row[name] for row in rows}) > 1]


def _common(rows: Sequence[Row], layout: Layout) -> str:
    """The keys that are the same in all rows, as a sentence's worth of text."""
    names = [name for name in layout.keys if name not in _varying(rows, layout)]
    return ", ".join(f"{name} {_text(rows[0][name])}" for name in names) if rows else ""


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def draw(rows: Sequence[Row], layout: Layout, file: Path) -> None:
    """Draw the ratios as bars, one panel per size; rows without a ratio are left out."""
    from matplotlib.figure import Figure

    panels: dict[tuple[Any, ...], list[tuple[str, float]]] = {}
    varying = _varying(rows, layout)
    for row, ratio in zip(rows, ratios(rows, layout), strict=True):
        if ratio is not None:
            key = tuple(row[name] for name in layout.keys)
            panels.setdefault(key, []).append((row["arm"], ratio))
    if not panels:
        raise ValueError(f"--plot: no row has a ratio; measure arm {layout.reference_arm} as well")
    num_rows = -(-len(panels) // BARS_PER_ROW)
    figure = Figure(figsize=(6.5 * BARS_PER_ROW, 3.2 * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, BARS_PER_ROW, squeeze=False).flatten()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (key, bars) in zip(axes, panels.items(), strict=False):
        names, heights = zip(*bars, strict=True)
        drawn = axis.bar(names, heights, color=BLUE)
        axis.bar_label(drawn, fmt="%.2f", fontsize=7)
        axis.axhline(1.0, color=GREY, linewidth=1)
        axis.set_ylabel(f"{layout.figure} / arm {layout.reference_arm}")
        named = [pair for pair in zip(layout.keys, key, strict=True) if pair[0] in varying]
        axis.set_title(", ".join(f"{name} {value}" for name, value in named), fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
    figure.suptitle(f"{layout.title}: {_common(rows, layout)}", fontsize=9)
    figure.savefig(file, dpi=120)
