"""Sums of the costs, the comparison of both executions, and break-evens against a plain scan."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest

from vqmoe_megatron.plan.cost import (
    QUANTITIES,
    Comparison,
    break_even_num_codes,
    compare,
    layer_cost,
    search_break_even_num_codes,
)
from vqmoe_megatron.plan.layer_shape import LayerShape
from vqmoe_megatron.plan.wire_cost import RowTraffic

TOKENS = 4096
LARGE = LayerShape(  # many ranks, wide rows: what is left of a row is its size
    num_local_tokens=TOKENS, hidden_size=4096, moe_ffn_hidden_size=1024, num_moe_experts=64,
    expert_model_parallel_size=64, path="discrete", straight_through="none",
)  # fmt: skip
SMALL = LayerShape(
    num_local_tokens=37, hidden_size=12, moe_ffn_hidden_size=8, num_moe_experts=4,
    expert_model_parallel_size=2, num_microbatches=3,
)  # fmt: skip


def scan(layer: LayerShape, quantity: str, candidates: range) -> int:
    """The last number of codes up to which code space costs no more, one by one."""
    last = 0
    for num_codes in candidates:
        shape = replace(layer, num_codes=num_codes)
        cost = {
            execution: QUANTITIES[quantity](layer_cost(replace(shape, execution=execution)))
            for execution in ("tokens", "code_space")
        }
        if cost["code_space"] > cost["tokens"]:
            return last
        last = num_codes
    raise AssertionError("the scan was too short")


@pytest.mark.parametrize(
    "quantity",
    [
        "forward_flops",
        "flops_per_step",
        "wire_bytes",
        "forward_wire_bytes",
        "wire_bytes_per_step",
        "saved_bytes",
    ],
)
@pytest.mark.parametrize("straight_through", ["token", "none"])
@pytest.mark.parametrize(
    ("code_map", "slices", "unit"), [("mod", 1, 1), ("mod", 3, 1), ("balanced", 2, 2)]
)  # fmt: skip
def test_break_even_is_what_a_scan_finds(
    quantity: str, straight_through: str, code_map: str, slices: int, unit: int
) -> None:
    layer = replace(
        SMALL, num_codes=4, num_code_slices=slices, straight_through=straight_through,
        code_map=code_map,
    )  # fmt: skip
    found = break_even_num_codes(layer, quantity)
    assert found == scan(layer, quantity, range(unit, 2000, unit))


@pytest.mark.parametrize(
    ("changes", "quantity", "expected"),
    [
        ({}, "forward_wire_bytes", Fraction(2)),
        ({"bytes_per_element": 2}, "forward_wire_bytes", Fraction(2)),
        ({"bytes_per_element": 2}, "wire_bytes", Fraction(4, 3)),  # bf16 rows, fp32 sums
        ({}, "wire_bytes", Fraction(2)),  # sums as wide as rows
        # 2 T rows less, K (b + 4) bytes more: the sums per code are exchanged beside the rows
        ({"straight_through": "token"}, "wire_bytes", Fraction(1)),
        ({"straight_through": "token", "bytes_per_element": 2}, "wire_bytes", Fraction(2, 3)),
        ({}, "forward_flops", Fraction(64)),  # K / P rows for T
        ({"path": "dual"}, "forward_wire_bytes", Fraction(2)),  # the other path is common
    ],
)
def test_break_even_of_large_layers(changes: dict, quantity: str, expected: Fraction) -> None:
    num_codes = break_even_num_codes(replace(LARGE, **changes), quantity)
    assert num_codes is not None
    assert abs(num_codes - expected * TOKENS) <= 64  # a table grows by whole rounds over experts


def test_straight_through_without_sums_per_code_would_break_even_at_2_tokens() -> None:
    """The design's table has the owner form the sums from the rows that it gets anyway."""
    layer = replace(LARGE, straight_through="token", num_codes=2 * TOKENS, execution="code_space")
    in_code_space, tokens = layer_cost(layer).wire, layer_cost(replace(layer, execution="tokens"))
    sums = sum(t.sent_bytes for t in in_code_space.terms if t.collective == "reduce_scatter")
    ratio = (in_code_space.microbatch_bytes - sums) / tokens.wire.microbatch_bytes
    assert ratio == pytest.approx(1.0, abs=1e-3)


def test_break_even_at_the_ends() -> None:
    one_rank = replace(LARGE, expert_model_parallel_size=1)
    assert break_even_num_codes(one_rank, "wire_bytes") is None  # nothing is ever sent
    # one row of the table per rank against one count per pair of ranks
    no_tokens = replace(LARGE, num_local_tokens=0, hidden_size=64)
    assert break_even_num_codes(no_tokens, "wire_bytes") == 0


def test_a_table_per_step_pays_for_as_many_more_codes_as_there_are_microbatches() -> None:
    layer = replace(LARGE, num_microbatches=8, execution="code_space")
    every = break_even_num_codes(layer, "wire_bytes_per_step")
    once = break_even_num_codes(replace(layer, table_per_step=True), "wire_bytes_per_step")
    assert every is not None and once is not None
    assert once / every == pytest.approx(8, rel=0.02)


def test_search_break_even_is_experts_plus_expert_width() -> None:
    assert search_break_even_num_codes(LARGE) == 64 + 2 * 1024
    gated = replace(LARGE, gated_linear_unit=True, num_code_slices=4)
    assert search_break_even_num_codes(gated) == 64 + 3 * 1024
    assert search_break_even_num_codes(replace(LARGE, path="continuous")) is None
    # a quarter of the columns: four times as many codes, less the projection's H of them
    low_dim = replace(LARGE, code_dim=LARGE.hidden_size // 4)
    assert search_break_even_num_codes(low_dim) == 4 * (64 + 2 * 1024) - LARGE.hidden_size


def test_compare_lays_both_executions_side_by_side() -> None:
    layer = replace(LARGE, expert_model_parallel_size=4, num_codes=64, num_microbatches=2)
    tokens = layer_cost(layer)
    code_space = layer_cost(replace(layer, execution="code_space"))
    rows = {row.quantity: row for row in compare(layer)}
    assert list(rows) == list(QUANTITIES)
    assert rows["wire_bytes"] == Comparison(
        "wire_bytes",
        tokens.wire.microbatch_bytes,
        code_space.wire.microbatch_bytes,
        break_even_num_codes(layer, "wire_bytes"),
    )
    assert rows["flops_per_step"].tokens == 2 * tokens.flops.microbatch_flops
    assert rows["saved_bytes"].code_space == code_space.saved.saved_bytes
    assert {row.cheaper for row in rows.values()} == {"code_space"}
    ratio = rows["wire_bytes"].ratio
    assert ratio is not None and ratio <= 1 / 40
    # either execution of the layer may be handed in, and the table is the code space's
    assert compare(replace(layer, execution="code_space")) == compare(layer)
    once = compare(replace(layer, execution="code_space", table_per_step=True))
    assert {r.quantity: r for r in once}["wire_bytes_per_step"].code_space < rows[
        "wire_bytes_per_step"
    ].code_space


def test_losing_rows_stay_in_the_table() -> None:
    rows = {row.quantity: row for row in compare(replace(LARGE, num_codes=4 * TOKENS))}
    assert rows["forward_wire_bytes"].cheaper == "tokens"
    assert rows["forward_wire_bytes"].ratio == pytest.approx(2.0, rel=1e-3)
    assert rows["forward_flops"].cheaper == "code_space"
    one_rank = {row.quantity: row for row in compare(replace(LARGE, expert_model_parallel_size=1))}
    assert (one_rank["wire_bytes"].cheaper, one_rank["wire_bytes"].ratio) == ("equal", None)


def test_break_even_agrees_with_the_verdict() -> None:
    for quantity in ("forward_wire_bytes", "wire_bytes", "flops_per_step", "saved_bytes"):
        most = break_even_num_codes(SMALL, quantity)
        assert most is not None and most > 0
        for num_codes, wins in ((most, True), (most + 1, False)):
            rows = {row.quantity: row for row in compare(replace(SMALL, num_codes=num_codes))}
            assert (rows[quantity].cheaper != "tokens") is wins


def test_layer_cost_takes_counted_rows_and_sums_steps() -> None:
    counted = RowTraffic(num_rows_sent=5, num_rows_received=7, largest_gathered_rows=0)
    cost = layer_cost(replace(SMALL, path="continuous"), counted)
    # 1 block of 2 counts; rows of 48 bytes: 5 out and 7 back, forward and backward
    assert cost.wire.microbatch_bytes == 16 + 2 * (5 + 7) * 48
    assert cost.wire_bytes_per_step == 3 * (16 + 2 * 12 * 48)
    assert cost.flops_per_step == 3 * cost.flops.microbatch_flops


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of forward_flops"):
        break_even_num_codes(SMALL, "seconds")
    with pytest.raises(ValueError, match="needs expert_input=code"):
        compare(replace(SMALL, expert_input="blend"))
    with pytest.raises(ValueError, match="needs a discrete path"):
        compare(replace(SMALL, path="continuous"))
