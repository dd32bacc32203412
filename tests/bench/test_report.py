"""Ratios are taken within one size and run; JSON, Markdown and the plot hold every row."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from vqmoe_megatron.bench.origin import origin
from vqmoe_megatron.bench.report import Layout, Outputs, markdown, ratios, show, write

LAYOUT = Layout("vqmoe bench test", "median_ms", "A", ("num_codes", "pass"), ("p10_ms",))


def row(arm: str, num_codes: int, median_ms: float | None) -> dict:
    return {"arm": arm, "text": f"arm {arm}", "num_codes": num_codes, "pass": "forward",
            "median_ms": median_ms, "p10_ms": 1.0}  # fmt: skip


ROWS = [row("A", 8, 4.0), row("C", 8, 2.0), row("C", 16, 3.0), row("A", 16, 2.0), row("E", 8, None),
        row("C", 32, 5.0)]  # fmt: skip


def test_ratios_stay_within_their_size() -> None:
    assert ratios(ROWS, LAYOUT) == [1.0, 0.5, 1.5, 1.0, None, None]


def test_a_reference_of_zero_gives_no_ratio() -> None:
    assert ratios([row("A", 8, 0), row("C", 8, 2.0)], LAYOUT) == [None, None]


def test_the_table_shows_all_rows_and_what_they_have_in_common() -> None:
    stream = io.StringIO()
    show(ROWS, LAYOUT, Console(file=stream, width=160))
    text = stream.getvalue()
    assert text.count("arm C") == 3
    assert "pass forward" in text
    assert "0.500" in text and "1.500" in text  # what loses stays


def test_markdown_has_origin_and_ratios() -> None:
    lines = markdown(ROWS, LAYOUT, origin()).splitlines()
    assert lines[0] == "# vqmoe bench test"
    assert "| C | arm C | 16 | 3.000 | 1.500 | 1.000 |" in lines
    assert "| E | arm E | 8 | - | - | 1.000 |" in lines
    assert "All rows: pass forward." in lines


def test_files_are_written(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "r.json", tmp_path / "r.md", tmp_path / "r.png")
    write(ROWS, LAYOUT, origin(), outputs)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rows"] == ROWS
    assert {"machine", "commit", "versions", "uncommitted_changes"} <= set(found)
    assert found["machine"]["cores"] >= 1
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="measure arm A as well"):
        write(ROWS[1:3], LAYOUT, origin(), Outputs(plot=tmp_path / "r.png"))


def test_files_that_cannot_be_written_are_refused_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="its directory does not exist"):
        Outputs(json=tmp_path / "missing" / "r.json")
    with pytest.raises(ValueError, match="name it r.png"):
        Outputs(plot=tmp_path / "r.pdf")


@pytest.mark.parametrize("name", ["r.json", "r.md", "r.png"])
def test_our_own_result_is_replaced_and_no_other_file(tmp_path: Path, name: str) -> None:
    files = {"r.json": "json", "r.md": "markdown", "r.png": "plot"}
    path = tmp_path / name
    for _ in range(2):
        write(ROWS, LAYOUT, origin(), Outputs(**{files[name]: path}))
    result = path.read_bytes()
    foreign = {
        "r.json": (b'{"rows": []}', b"[]", b"", b"thesis"),
        "r.md": (result + b"\nI conclude that\n", b"# vqmoe bench test\n", b""),
        "r.png": (b"\x89PNG of a cat", b"vqmoe bench", b""),
    }
    for content in foreign[name]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is there already, and vqmoe bench did not"):
            Outputs(**{files[name]: path})
        assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="is there already"):
        Outputs(**{files[name]: path})


def test_a_file_that_came_while_measuring_is_kept(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "r.json", tmp_path / "r.md")
    (tmp_path / "r.md").write_text("mine")
    with pytest.raises(ValueError, match="r.md is there already"):
        write(ROWS, LAYOUT, origin(), outputs)
    assert [file.name for file in tmp_path.iterdir()] == ["r.md"]


def test_one_file_for_two_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="need a file each"):
        Outputs(json=tmp_path / "r.png", plot=tmp_path / "link" / "r.png")
