"""A result's status, what counts as done, and its pages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vqmoe_megatron.gpu_proof.part import PARTS, Findings
from vqmoe_megatron.gpu_proof.record import (
    Record,
    check_ours,
    judged,
    markdown,
    markdown_table,
    read_record,
    write_index,
    write_record,
)

SOURCE = {"sha256": "a" * 64, "commit": "b" * 40, "uncommitted_changes": False}
PASSING = {"name": "search", "passed": True, "text": ""}
RECORD = Record(
    part="kernels",
    title="Kernels",
    status="passed",
    reason="",
    size="full",
    device="cuda",
    started="2026-01-01 00:00:00",
    seconds=1.0,
    limit_seconds=10.0,
    budget_minutes=20.0,
    source=SOURCE,
    facts={},
    checks=[PASSING],
    tables={"Times": [{"arm": "a|b", "median_ms": 1.23456, "by_name": {"x": 1.0}}]},
    figures={"copy": 3.0e12},
    left_out=[],
    error=[],
)


@pytest.mark.parametrize(
    ("findings", "status"),
    [
        (Findings(checks=[PASSING]), "passed"),
        (Findings(), "failed"),
        (Findings(checks=[PASSING, {**PASSING, "passed": False}]), "failed"),
        (Findings(checks=[PASSING], left_out=["a: no time left"]), "incomplete"),
        (Findings(checks=[PASSING], error=["KeyError: x", "Traceback"]), "failed"),
    ],
)
def test_judged(findings: Findings, status: str) -> None:
    assert judged(findings)[0] == status


@pytest.mark.parametrize(
    ("changes", "size", "device", "is_done"),
    [
        ({}, "full", "cuda", True),
        ({}, "tiny", "cuda", False),
        ({}, "full", "cpu", False),
        ({"status": "incomplete"}, "full", "cuda", False),
        ({"source": {**SOURCE, "sha256": "c" * 64}}, "full", "cuda", False),
        ({"source": {**SOURCE, "commit": "c" * 40}}, "full", "cuda", True),  # the same files
    ],
)
def test_done_is_what_passed_from_this_source(changes, size, device, is_done) -> None:  # noqa: ANN001
    record = dataclasses.replace(RECORD, **changes)
    assert record.is_done_for(SOURCE, size, device) is is_done


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_record(tmp_path, "kernels") is None
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path, "kernels") == RECORD


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", json.dumps({**dataclasses.asdict(RECORD), "status": "fine"})],
)
def test_another_file_is_no_record(tmp_path: Path, content: str) -> None:
    (tmp_path / "kernels.json").write_text(content)
    with pytest.raises(ValueError, match="kernels.json"):
        read_record(tmp_path, "kernels")


def test_the_page_shows_what_failed_first_and_plain_columns_only() -> None:
    failed = {"name": "combine", "passed": False, "text": "x", "figure": 0.5, "limit": 0.1}
    page = markdown(dataclasses.replace(RECORD, checks=[PASSING, failed]))
    assert page.index("| combine | **NO** |") < page.index("| search | yes |")
    assert "| a\\|b | 1.235 |" in page
    assert "by_name" not in page
    assert "1 of 2 passed" in page


def test_a_table_has_the_columns_of_all_its_rows() -> None:
    assert markdown_table([{"a": 1}, {"a": 2000, "b": None}]) == [
        "| a | b |",
        "| --- | --- |",
        "| 1 |  |",
        "| 2,000 |  |",
    ]


@pytest.mark.parametrize("name", ["README.md", "train.log", "layer.md", "study.json"])
def test_a_file_of_our_name_in_a_folder_that_is_not_ours_is_refused(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "other.txt").touch()
    check_ours(tmp_path)
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(ValueError, match=f"{name} is not ours"):
        check_ours(tmp_path)


def test_the_index_makes_a_folder_ours(tmp_path: Path) -> None:
    write_index(tmp_path, PARTS)
    (tmp_path / "train.log").touch()
    check_ours(tmp_path)


def test_the_index_tells_of_parts_that_did_not_run(tmp_path: Path) -> None:
    write_record(tmp_path, RECORD)
    write_index(tmp_path, PARTS, "stopped by SIGINT")
    index = (tmp_path / "README.md").read_text()
    assert "[Kernels" in index and "1 of 1" in index
    assert index.count("not run: stopped by SIGINT") == len(PARTS) - 1
