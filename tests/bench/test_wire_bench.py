"""Counted bytes equal the formulas on real ranks; where they do not, the row says so."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from vqmoe_megatron.bench.cases import LayerCase
from vqmoe_megatron.bench.progress import Progress
from vqmoe_megatron.bench.wire_bench import (
    LAYOUTS,
    WIRE_ARMS,
    check_layout_fits,
    measure_wire,
    wire_rows,
)

CASE = LayerCase(4, 10, 12, 16, 32, "zipf")  # N does not divide K


def count(fields: dict, letters: list[str]) -> dict:
    """In a rank."""
    from vqmoe_megatron.bench.wire_rank import count_arms

    return count_arms(fields, letters)


@pytest.fixture(scope="module")
def findings(ranks) -> list[dict]:  # noqa: ANN001
    fields = dataclasses.asdict(CASE)
    return ranks(4).run(count, fields, list(WIRE_ARMS), layout=LAYOUTS["ep4"][1])


@pytest.mark.distributed
def test_every_arm_sends_what_is_predicted(findings) -> None:  # noqa: ANN001
    rows = wire_rows(CASE, "ep4", WIRE_ARMS, findings)
    assert [row["arm"] for row in rows[::2]] == list(WIRE_ARMS)
    for row in rows:
        assert row["matches"] is (None if row["arm"] in ("A", "A2") else True), row
        assert row["expert_model_parallel_size"] == row["num_ranks"] == 4
        assert row["wire_bytes"] > 0
    by_arm = {row["arm"]: row["wire_bytes"] for row in rows if row["pass"] == "forward_backward"}
    assert by_arm["E"] < by_arm["F"]
    assert by_arm["G8"] == by_arm["E"] / 4  # one table for four microbatches


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["etp2", "tp2ep2"])
def test_other_layouts(ranks, layout: str) -> None:  # noqa: ANN001
    num_ranks, sizes = LAYOUTS[layout]
    case = dataclasses.replace(CASE, dtype="bfloat16", norm="separate")
    letters = ["D", "F2", "F3", "G2"]
    found = ranks(num_ranks).run(count, dataclasses.asdict(case), letters, layout=sizes)
    for row in wire_rows(case, layout, letters, found):
        assert row["matches"] is True, row


@pytest.mark.distributed
def test_one_byte_or_one_collective_more_is_a_mismatch(findings) -> None:  # noqa: ANN001
    for damage in ("byte", "collective", "pass"):
        damaged = copy.deepcopy(findings)
        sent = damaged[2]["arms"]["C"]["sent"]
        if damage == "byte":
            sent[0][3] += 1
        elif damage == "collective":
            sent.append(list(sent[-1]))
        else:
            sent[0][0] = True
        rows = wire_rows(CASE, "ep4", ["C", "E"], damaged)
        assert [row["matches"] for row in rows if row["arm"] == "E"] == [True, True]
        assert False in [row["matches"] for row in rows if row["arm"] == "C"]


@pytest.mark.distributed
def test_local_ranks_are_started(capfd) -> None:  # noqa: ANN001
    rows = measure_wire(CASE, ["ep2"], ["C", "E"], Progress())
    assert [(row["arm"], row["pass"], row["matches"]) for row in rows] == [
        ("C", "forward", True),
        ("C", "forward_backward", True),
        ("E", "forward", True),
        ("E", "forward_backward", True),
    ]
    assert "Traceback" not in capfd.readouterr().err


def test_what_does_not_fit_is_refused_before_ranks_start() -> None:
    with pytest.raises(ValueError, match="--layouts 'ep3': choose from ep1"):
        measure_wire(CASE, ["ep3"], [], Progress())
    with pytest.raises(ValueError, match="--arms 'B'"):
        measure_wire(CASE, ["ep2"], ["B"], Progress())
    with pytest.raises(ValueError, match=r"ep4: num_experts % .* != 0: 6 % 4 = 2"):
        check_layout_fits(LayerCase(6, 12, 8, 16, 32), "ep4")
    with pytest.raises(ValueError, match=r"etp2: moe_ffn_hidden_size % .* 36 % 8 = 4"):
        check_layout_fits(LayerCase(6, 12, 8, 16, 36), "etp2")
