"""Every symptom of the troubleshooting pages is something that the product prints."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "docs" / "troubleshooting.md",
    ROOT / "docs" / "quickstart.md",
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
]
NOT_PRINTED_BY_US = ("PENDING", "JobArrayTaskLimit", "logs/slurm")


@functools.cache
def printed() -> str:
    """Every text of the package and its scripts; what is filled in is a gap."""
    parts = []
    for path in sorted((ROOT / "vqmoe_megatron").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                said = (v.value if isinstance(v, ast.Constant) else "\0" for v in node.values)
                parts.append("".join(map(str, said)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    for folder in ("slurm", "launchers"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".sh", ".sbatch"):
                parts.append(path.read_text("utf-8"))
    return "\n".join(parts)


def symptoms(text: str) -> list[str]:
    """Quoted texts in the first column of tables headed ``it says`` or ``symptom``."""
    found, is_ours = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            is_ours = False
        elif line.startswith(("| it says", "| symptom")):
            is_ours = True
        elif is_ours:
            found += re.findall(r"`([^`]+)`", line.split(" | ")[0])
    return found


def pieces(symptom: str) -> list[str]:
    """What of a symptom is the same in every case."""
    return [piece.strip() for piece in symptom.split("...") if len(piece.strip()) > 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_symptom_is_printed_somewhere(page: Path) -> None:
    found = symptoms(page.read_text("utf-8"))
    unknown = [
        piece
        for symptom in found
        for piece in pieces(symptom)
        if not symptom.startswith(NOT_PRINTED_BY_US) and not is_printed(piece)
    ]
    assert unknown == []


def is_printed(piece: str) -> bool:
    """Whether the words stand in one text, numbers and names of settings filled in or not."""
    return piece in printed()


def test_there_are_symptoms_and_a_wrong_one_is_seen() -> None:
    assert len(symptoms(PAGES[0].read_text("utf-8"))) > 60
    text = (
        "| it says | do |\n|---|---|\n| `never said by anybody ... ever` | x |\n\n| a |\n| `b` |\n"
    )
    assert symptoms(text) == ["never said by anybody ... ever"]
    assert not is_printed(pieces(symptoms(text)[0])[0])
