"""What a part says is on the disk soon, in JSON that every reader takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from vqmoe_megatron.gpu_proof.part import Job, choose_parts, dumped, read_findings


def job(folder: Path, seconds: float = 100.0) -> Job:
    return Job("kernels", "cpu", True, seconds, folder, folder)


def test_parts_keep_their_order_and_an_unknown_one_is_refused() -> None:
    assert [part.name for part in choose_parts("layer,kernels")] == ["kernels", "layer"]
    with pytest.raises(ValueError, match="no part 'kernel': choose from correctness, kernels"):
        choose_parts("kernel,layer")


def test_shares_are_those_of_twenty_minutes() -> None:
    assert sum(part.minutes for part in choose_parts(None)) == 20


def test_a_number_is_within_its_limit_or_not(tmp_path: Path) -> None:
    one = job(tmp_path)
    assert one.within("at the limit", 0.5, 0.5)
    assert not one.within("above", 0.6, 0.5)
    assert not one.within("not a number", math.nan, 0.5)
    assert [check["passed"] for check in one.findings.checks] == [True, False, False]


def test_what_was_said_can_be_read_before_the_part_ends(tmp_path: Path) -> None:
    one = job(tmp_path)
    one.row("Times", arm="a", median_ms=1.5)
    assert read_findings(tmp_path).tables == {"Times": [{"arm": "a", "median_ms": 1.5}]}
    one.publish(at_once=True)
    assert read_findings(tmp_path) == one.findings


def test_nothing_said_is_nothing_found(tmp_path: Path) -> None:
    assert read_findings(tmp_path).checks == []


def test_what_there_is_no_time_for_is_noted(tmp_path: Path) -> None:
    one = job(tmp_path, seconds=5.0)
    assert one.has_time("a")
    assert not one.has_time("b", 10.0)
    assert one.findings.left_out == ["b: no time left"]


def test_numbers_that_are_not_finite_become_texts() -> None:
    text = dumped({"a": [math.nan, 1.5], "b": {"c": (math.inf,)}, "d": None})
    content = json.loads(text, parse_constant=pytest.fail)
    assert content == {"a": ["nan", 1.5], "b": {"c": ["inf"]}, "d": None}
