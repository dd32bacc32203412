"""A part's result as it is kept: ``PART.json``, ``PART.md``, and ``README.md`` above all of them.

A result counts as done when its part passed, from the same source, at the same size, on the same
kind of device. Everything else is run again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vqmoe_megatron.bench.origin import commit_in_words
from vqmoe_megatron.gpu_proof.card import in_words
from vqmoe_megatron.gpu_proof.part import PARTS, Findings, Part, dumped
from vqmoe_megatron.rundir.atomic import replace_file

PASSED, FAILED, INCOMPLETE, NOT_RUN = "passed", "failed", "incomplete", "not run"
STATUSES = (PASSED, FAILED, INCOMPLETE, NOT_RUN)
SHOWN_ERROR_LINES = 30
INDEX, INDEX_HEAD = "README.md", "# GPU proof\n"


@dataclass(frozen=True)
class Record:
    """``PART.json``. ``seconds`` is what the part took, ``limit_seconds`` what it had."""

    part: str
    title: str
    status: str
    reason: str
    size: str  # full | tiny
    device: str  # cuda | cpu
    started: str  # UTC
    seconds: float
    limit_seconds: float
    budget_minutes: float
    source: dict[str, Any]
    facts: dict[str, Any]
    checks: list[dict[str, Any]]
    tables: dict[str, list[dict[str, Any]]]
    figures: dict[str, Any]
    left_out: list[str]
    error: list[str]  # in one line, then its traceback or the last that the process printed

    def is_done_for(self, source: dict[str, Any], size: str, device: str) -> bool:
        """Whether the part need not be run again."""
        same = self.source.get("sha256") == source["sha256"]
        return self.status == PASSED and same and (self.size, self.device) == (size, device)


def check_ours(out: Path) -> None:
    """Refuse to write over files of others: the index says that a folder is the proof's.

    Raises:
        ValueError: for a folder that holds files of our names but is not.
    """
    index = out / INDEX
    if index.is_file() and index.read_text("utf-8", "replace").startswith(INDEX_HEAD):
        return
    names = [f"{part.name}{suffix}" for part in PARTS for suffix in (".json", ".md", ".log")]
    for name in (INDEX, *names):
        if os.path.lexists(out / name):
            raise ValueError(
                f"{out / name} is not ours: {out} holds no results of this proof; give another "
                "--out, or move the file away"
            )


def json_file(out: Path, part: str) -> Path:
    """Where a part's result is."""
    return out / f"{part}.json"


def read_record(out: Path, part: str) -> Record | None:
    """Return a part's result, None when there is none.

    Raises:
        ValueError: for a file that is no such result.
    """
    path = json_file(out, part)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is no result of a part ({error}); move it away") from None
    names = {field.name for field in fields(Record)}
    if not isinstance(content, dict) or set(content) != names:
        raise ValueError(
            f"{path} is no result of a part: it must have the keys {', '.join(sorted(names))}; "
            "move it away"
        )
    record = Record(**content)
    if record.status not in STATUSES:
        raise ValueError(f"{path}: status {record.status!r} is none of {', '.join(STATUSES)}")
    return record


def judged(findings: Findings) -> tuple[str, str]:
    """Return status and reason of a part that came to its end."""
    if findings.error:
        return FAILED, findings.error[0]
    failed = [check["name"] for check in findings.checks if not check["passed"]]
    if failed:
        more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        return FAILED, f"check failed: {failed[0]}{more}"
    if findings.left_out:
        return INCOMPLETE, f"left out: {findings.left_out[0]}"
    if not findings.checks:
        return FAILED, "it checked nothing"
    return PASSED, ""


def write_record(out: Path, record: Record) -> None:
    """Write a part's JSON and Markdown, each whole."""
    replace_file(json_file(out, record.part), dumped(asdict(record)))
    replace_file(out / f"{record.part}.md", markdown(record))


def markdown(record: Record) -> str:
    """Return a part's result for a reader."""
    lines = [f"# {record.title}", "", f"**{record.status}**{_behind(record.reason)}", ""]
    lines += [
        f"- {in_words(record.facts)}" if record.facts else f"- {record.device}",
        f"- size {record.size}, {record.started} UTC, {record.seconds:.0f} s of "
        f"{record.limit_seconds:.0f} s, budget {record.budget_minutes:g} minutes",
        f"- source {record.source['sha256'][:12]}, commit {commit_in_words(record.source)}",
    ]
    lines += [f"- {name}: {_text(value)}" for name, value in record.figures.items()]
    if record.error:
        lines += ["", "## Error", "", "```", *record.error[1:][-SHOWN_ERROR_LINES:], "```"]
    if record.left_out:
        lines += ["", "## Left out", "", *(f"- {text}" for text in record.left_out)]
    if record.checks:
        num_passed = sum(check["passed"] for check in record.checks)
        lines += ["", f"## Checks: {num_passed} of {len(record.checks)} passed", ""]
        rows = sorted(record.checks, key=lambda check: check["passed"])
        lines += markdown_table(
            {**check, "passed": "yes" if check["passed"] else "**NO**"} for check in rows
        )
    for title, rows in record.tables.items():
        lines += ["", f"## {title}", "", *markdown_table(rows)]
    return "\n".join(lines) + "\n"


def markdown_table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Return a table of all columns that hold plain values, numbers with four digits."""
    rows = list(rows)
    columns = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if not any(isinstance(row.get(name), (dict, list)) for row in rows)
    ]
    lines = [_line(columns), _line(["---"] * len(columns))]
    return lines + [_line([_text(row.get(name)) for name in columns]) for row in rows]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _behind(reason: str) -> str:
    return f": {_text(reason)}" if reason else ""


def write_index(out: Path, parts: Sequence[Part], stopped: str = "") -> None:
    """Write ``README.md``: every part with its status and its files."""
    rows = []
    head = ""
    for part in parts:
        record = read_record(out, part.name)
        if record is None:
            rows.append({"part": part.title, "status": f"{NOT_RUN}{_behind(stopped)}"})
            continue
        num_passed = sum(check["passed"] for check in record.checks)
        rows.append(
            {
                "part": f"[{part.title}]({part.name}.md)",
                "status": f"{record.status}{_behind(record.reason)}",
                "checks": f"{num_passed} of {len(record.checks)}",
                "seconds": round(record.seconds),
                "device": (record.facts.get("card") or {}).get("name", record.device),
                "size": record.size,
                "commit": commit_in_words(record.source),
                "data": f"[JSON]({part.name}.json)",
            }
        )
        head = head or (in_words(record.facts) if record.facts else "")
    lines = ["", *([head, ""] if head else []), *markdown_table(rows)]
    replace_file(out / INDEX, INDEX_HEAD + "\n".join(lines) + "\n")
