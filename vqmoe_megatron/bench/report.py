"""Results as a table on the terminal, as JSON, as Markdown with ratios, and as a bar plot.

A ratio is a row's figure over that of the reference arm at the same sizes, routing, layout and
pass, measured in the same run. Rows that lose stay.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vqmoe_megatron.bench.origin import commit_in_words
from vqmoe_megatron.rundir.atomic import replace_file
from vqmoe_megatron.rundir.own_outputs import (
    is_sealed,
    refuse_foreign,
    said_as_refusal,
    sealed,
)
from vqmoe_megatron.runtime.optional_packages import require

Row = dict[str, Any]
BLUE, GREY = "#0072B2", "#666666"
BARS_PER_ROW = 2  # panels beside each other
PLOT_MARK = "vqmoe bench"  # in the PNG's text: it shows whose plot it is


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
        files = [file for file in (self.json, self.markdown, self.plot) if file is not None]
        for file in files:
            if not file.resolve().parent.is_dir():
                raise ValueError(f"{file}: its directory does not exist")
        if self.plot is not None:
            require("matplotlib", f"--plot {self.plot}")
        if len({file.resolve() for file in files}) < len(files):
            raise ValueError("--json, --markdown and --plot need a file each")
        if self.plot is not None and self.plot.suffix != ".png":
            raise ValueError(f"--plot {self.plot}: the plot is a PNG, name it {self.plot.stem}.png")
        self.check_ours()

    def check_ours(self) -> None:
        """Raise ``ValueError`` for a file that is there and is no result of ``vqmoe bench``."""
        for file, is_ours in (
            (self.json, _is_our_json),
            (self.markdown, is_sealed),
            (self.plot, _is_our_plot),
        ):
            if file is not None and os.path.lexists(file):
                if not file.is_file() or not is_ours(file.read_bytes()):
                    refuse_foreign(file, "vqmoe bench")


def _is_our_json(content: bytes) -> bool:
    try:
        result = json.loads(content)
    except ValueError:
        return False
    return isinstance(result, dict) and {"machine", "commit", "benchmark", "rows"} <= set(result)


def _is_our_plot(content: bytes) -> bool:
    return content.startswith(b"\x89PNG") and PLOT_MARK.encode() in content


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
    """Write the files that were asked for, each whole.

    Raises:
        ValueError: for one that cannot be written, or that is no result of ``vqmoe bench``.
    """
    outputs.check_ours()
    whole = {**origin, "benchmark": layout.title, "rows": list(rows)}
    for file, content in (
        (outputs.json, lambda: json.dumps(whole, indent=2) + "\n"),
        (outputs.markdown, lambda: sealed(markdown(rows, layout, origin))),
        (outputs.plot, lambda: draw(rows, layout)),
    ):
        if file is not None:
            with said_as_refusal(file):
                replace_file(file, content())


def markdown(rows: Sequence[Row], layout: Layout, origin: Row) -> str:
    """Return the table with its origin."""
    machine, versions = origin["machine"], origin["versions"]
    headings, lines = _cells(rows, layout)
    return "\n".join(
        [
            f"# {layout.title}",
            "",
            f"`ratio`: {layout.figure} over that of arm {layout.reference_arm} in the same run.",
            f"All rows: {_common(rows, layout) or 'nothing in common'}.",
            f"{machine['cores']} cores ({machine['processor']}), GPU: {machine['gpu'] or 'none'},",
            f"load {machine['load_average']:.1f} at the start, Python {machine['python']}, "
            f"torch {versions['torch']}, megatron-core {versions['megatron-core']}, "
            f"commit {commit_in_words(origin)}.",
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


def draw(rows: Sequence[Row], layout: Layout) -> bytes:
    """Draw the ratios as bars, one panel per size, as PNG; rows without a ratio are left out."""
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
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": PLOT_MARK})
    return stream.getvalue()
