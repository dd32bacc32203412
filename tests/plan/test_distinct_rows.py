"""Expected distinct rows against drawn reads, and which exchange they choose."""

from __future__ import annotations

import random

import pytest

from vqmoe_megatron.plan.distinct_rows import (
    balanced_rows_per_owner,
    expected_distinct,
    gathers_table,
)


@pytest.mark.parametrize(("num_reads", "num_rows"), [(1, 7), (40, 16), (300, 1000), (5, 1)])
def test_reads_spread_evenly_are_as_many_as_expected(num_reads: int, num_rows: int) -> None:
    draw = random.Random(3)
    tries = 400
    found = [len({draw.randrange(num_rows) for _ in range(num_reads)}) for _ in range(tries)]
    assert expected_distinct(num_reads, num_rows) == pytest.approx(sum(found) / tries, rel=0.02)


def test_uneven_reads_are_fewer_rows() -> None:
    draw = random.Random(3)
    drawn = {min(draw.randrange(100), draw.randrange(100)) for _ in range(80)}
    assert len(drawn) < expected_distinct(80, 100)


def test_many_rows_are_exact() -> None:
    assert expected_distinct(1000, 2**24) == pytest.approx(1000 - 1000 * 999 / 2 / 2**24, rel=1e-8)


def test_a_table_is_gathered_where_most_rows_are_read() -> None:
    assert gathers_table("auto", 10_000, 64)
    assert gathers_table("auto", 13 * 12_288, 12_288)
    assert not gathers_table("auto", 12 * 12_288, 12_288)
    assert not gathers_table("auto", 64, 10_000)
    assert gathers_table("table", 64, 10_000)
    assert not gathers_table("rows", 10_000, 64)


def test_owners_share_equally() -> None:
    assert balanced_rows_per_owner(10_000, 64, 4) == 16
    assert balanced_rows_per_owner(1, 64, 4) == 1
