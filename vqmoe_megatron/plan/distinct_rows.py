"""How many distinct rows of a code memory a microbatch reads, and which exchange sends less.

Counts depend on the data. Expected is what reads that are spread evenly over the rows give: of all
distributions the one with the most distinct rows, so every figure from it is an upper bound. Text
reads unevenly, so the choice of the exchange takes its reads for fewer (benchmarks/step_wire.md).
"""

from __future__ import annotations

from math import ceil, expm1, log1p

# Asking costs two small exchanges and a wait for the host; a table may be so much larger instead.
TABLE_MAY_BE_LARGER = 1.25
# Of 12,288 rows 24,576 reads of Python source found 3,022; an eighth of even ones finds 2,719.
READS_OF_TEXT_FOR_AN_EVEN_ONE = 8


def expected_distinct(num_reads: int, num_rows: int) -> float:
    """Distinct rows among reads that are spread evenly over ``num_rows``, the most there are."""
    if num_rows == 1:
        return float(min(num_reads, 1))
    return -num_rows * expm1(num_reads * log1p(-1.0 / num_rows))


def distinct_of_text(num_reads: int, num_rows: int) -> float:
    """Distinct rows that a text's reads are taken for where most rows are read."""
    return expected_distinct(ceil(num_reads / READS_OF_TEXT_FOR_AN_EVEN_ONE), num_rows)


def gathers_table(exchange: str, num_reads: int, num_rows: int) -> bool:
    """Whether all rows are gathered, by ``code_memory.exchange`` and, for auto, the bytes sent."""
    if exchange == "auto":
        return num_rows <= TABLE_MAY_BE_LARGER * distinct_of_text(num_reads, num_rows)
    return exchange == "table"


def balanced_rows_per_owner(num_reads: int, num_rows: int, num_ranks: int) -> int:
    """Rows that a rank asks of each of ``num_ranks`` owners: an equal share, rounded up."""
    return ceil(expected_distinct(num_reads, num_rows) / num_ranks)
