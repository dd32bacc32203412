"""How many distinct rows of a code memory a microbatch reads, and which exchange sends less.

Counts depend on the data. Expected is what reads that are spread evenly over the rows give: of all
distributions the one with the most distinct rows, so every figure from it is an upper bound.
"""

from __future__ import annotations

from math import ceil, expm1, log1p

# Asking costs two small exchanges and a wait for the host; a table may be so much larger instead.
TABLE_MAY_BE_LARGER = 1.25


def expected_distinct(num_reads: int, num_rows: int) -> float:
    """Distinct rows among reads that are spread evenly over ``num_rows``, the most there are."""
    if num_rows == 1:
        return float(min(num_reads, 1))
    return -num_rows * expm1(num_reads * log1p(-1.0 / num_rows))


def gathers_table(exchange: str, num_reads: int, num_rows: int) -> bool:
    """Whether all rows are gathered, by ``code_memory.exchange`` and, for auto, the bytes sent."""
    if exchange == "auto":
        return num_rows <= TABLE_MAY_BE_LARGER * expected_distinct(num_reads, num_rows)
    return exchange == "table"


def balanced_rows_per_owner(num_reads: int, num_rows: int, num_ranks: int) -> int:
    """Rows that a rank asks of each of ``num_ranks`` owners: an equal share, rounded up."""
    return ceil(expected_distinct(num_reads, num_rows) / num_ranks)
