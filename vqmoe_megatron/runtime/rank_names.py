"""Name ranks in messages: short for one, and still short for a thousand."""

from __future__ import annotations

from collections.abc import Iterable

SHORTEST_RANGE = 4  # ranks in a row that are written first-last


def rank_names(ranks: Iterable[int]) -> str:
    """Return ``"rank 3"``, ``"ranks 0 1 5"`` or ``"ranks 0-7 9"``; ``"no rank"`` for none."""
    rows: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if rows and rank == rows[-1][-1] + 1:
            rows[-1].append(rank)
        else:
            rows.append([rank])
    if not rows:
        return "no rank"
    parts = [
        f"{row[0]}-{row[-1]}" if len(row) >= SHORTEST_RANGE else " ".join(map(str, row))
        for row in rows
    ]
    is_one = len(rows) == 1 and len(rows[0]) == 1
    return f"{'rank' if is_one else 'ranks'} {' '.join(parts)}"
