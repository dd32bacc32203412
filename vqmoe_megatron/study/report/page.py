"""A report as data, and its two forms: Markdown beside its PNGs, and one HTML file with all inside.

The HTML page has no script and loads nothing; it follows the reader's light or dark setting.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

DPI = 130
Drawing = tuple[str, "Figure | str", str]  # file name, what was drawn or why nothing, caption


@dataclass(frozen=True)
class Table:
    """Text cells; columns whose cells are numbers stand to the right."""

    headings: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str = ""

    def __post_init__(self) -> None:
        for line in self.lines:
            if len(line) != len(self.headings):
                raise ValueError(
                    f"a table's line has {len(line)} cells for {len(self.headings)} headings: "
                    f"{', '.join(line)}; {', '.join(self.headings)}"
                )


@dataclass(frozen=True)
class Plot:
    """A PNG, its file name, what it shows in a phrase, and the caption below it."""

    file_name: str
    png: bytes
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with text, plots and tables in this order."""

    title: str
    paragraphs: Sequence[str] = ()
    plots: Sequence[Plot] = ()
    tables: Sequence[Table] = ()


@dataclass(frozen=True)
class Page:
    """A whole report; ``facts`` are the lines of its head."""

    title: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section] = field(default_factory=tuple)


def drawn_section(
    title: str,
    drawings: Sequence[Drawing],
    paragraphs: Sequence[str] = (),
    tables: Sequence[Table] = (),
) -> Section:
    """Return a section with its drawings as PNGs; for one that is missing a sentence says why."""
    plots, reasons = [], []
    for name, drawn, caption in drawings:
        if isinstance(drawn, str):
            reasons.append(f"No plot {name}: {drawn}.")
        else:
            stream = io.BytesIO()
            drawn.savefig(stream, format="png", dpi=DPI)
            plots.append(Plot(name, stream.getvalue(), caption.split(".")[0], caption))
    return Section(title, [*reasons, *paragraphs], plots, tables)


def markdown(page: Page) -> str:
    """Return the page as Markdown; plots are links to their file names."""
    blocks = [f"# {page.title}", "\n".join(f"- {name}: {value}" for name, value in page.facts)]
    for section in page.sections:
        blocks += [f"## {section.title}", *section.paragraphs]
        for plot in section.plots:
            blocks += [f"![{plot.alt}]({plot.file_name})", f"*{plot.caption}*"]
        for table in section.tables:
            rules = ["---:" if right else "---" for right in _right(table)]
            lines = [[_cell(cell) for cell in line] for line in (table.headings, *table.lines)]
            rows = [lines[0], rules, *lines[1:]]
            blocks.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
            blocks += [table.caption] if table.caption else []
    return "\n\n".join(blocks) + "\n"


def _cell(text: str) -> str:
    """A cell of a Markdown table is one line, and a bar would end it."""
    return " ".join(text.splitlines()).replace("|", "\\|")


def html_page(page: Page) -> str:
    """Return the page as one HTML document; plots are inside as base64."""
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in page.facts
    )
    body = "\n".join(_section(section) for section in page.sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(page.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<main>\n<h1>{html.escape(page.title)}</h1>\n<dl>{facts}</dl>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{html.escape(section.title)}</h2>"]
    parts += [f"<p>{html.escape(text)}</p>" for text in section.paragraphs]
    for plot in section.plots:
        data = base64.b64encode(plot.png).decode("ascii")
        parts.append(
            f'<figure><img alt="{html.escape(plot.alt)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>"
        )
    parts += [_table(table) for table in section.tables]
    return f"<section>{''.join(parts)}</section>"


def _table(table: Table) -> str:
    classes = [' class="right"' if right else "" for right in _right(table)]

    def row(tag: str, cells: Sequence[str]) -> str:
        found = zip(classes, cells, strict=True)
        return "<tr>" + "".join(f"<{tag}{c}>{html.escape(t)}</{tag}>" for c, t in found) + "</tr>"

    lines = "".join(row("td", line) for line in table.lines)
    caption = f"<p>{html.escape(table.caption)}</p>" if table.caption else ""
    return (
        f'<div class="wide"><table><thead>{row("th", table.headings)}</thead>'
        f"<tbody>{lines}</tbody></table></div>{caption}"
    )


def _right(table: Table) -> list[bool]:
    """Whether a column's cells all begin like a number."""
    columns = zip(*table.lines, strict=True) if table.lines else [()] * len(table.headings)
    return [
        any(column) and all(cell[:1] in "0123456789-+" for cell in column if cell)
        for column in columns
    ]


STYLE = """
:root { color-scheme: light dark; --text: #1b1b1b; --back: #ffffff; --soft: #5c5c5c;
  --line: #d8d8d8; --head: #f2f4f6; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e6e6; --back: #16181b; --soft: #a6abb2;
  --line: #3a3f46; --head: #22262b; } }
body { margin: 0; background: var(--back); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 1140px; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0.5rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem;
  border-top: 1px solid var(--line); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1.25rem; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
p { max-width: 78ch; }
figure { margin: 1rem 0 1.5rem; }
img { display: block; max-width: 100%; height: auto; background: #ffffff; border-radius: 6px;
  border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: 0.92rem; margin-top: 0.5rem; max-width: 90ch; }
.wide { overflow-x: auto; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.8rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); text-align: left;
  white-space: nowrap; vertical-align: top; }
th { background: var(--head); }
.right { text-align: right; }
"""
