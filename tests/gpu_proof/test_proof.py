"""The proof as a user starts it, on the CPU at its tiny size: it must not fail on the day."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from vqmoe_megatron.gpu_proof.part import PARTS
from vqmoe_megatron.gpu_proof.record import Record, read_record

ROOT = Path(__file__).resolve().parents[2]
PARTS_OF_FAST_TIER = ("kernels", "layer")  # no runs of their own


def start(out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "vqmoe_megatron.gpu_proof", "--out", str(out)]
    return subprocess.Popen(
        [*command, "--tiny", "--device", "cpu", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(out: Path, *words: str, seconds: float = 300.0) -> tuple[int, str]:
    process = start(out, *words)
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def records(out: Path, names=PARTS_OF_FAST_TIER) -> dict[str, Record]:  # noqa: ANN001
    """As the reader takes them, and as strict JSON."""
    for name in names:
        json.loads((out / f"{name}.json").read_text(), parse_constant=pytest.fail)
    return {name: read_record(out, name) for name in names}


@pytest.fixture(scope="module")
def proved(tmp_path_factory) -> tuple[Path, dict[str, Record]]:  # noqa: ANN001
    """A first call in which one part is made to fail, and what it left."""
    out = tmp_path_factory.mktemp("proof")
    parts = ",".join(PARTS_OF_FAST_TIER)
    code, said = run(out, "--parts", parts, "--fail", "kernels")
    assert code == 1, said
    return out, records(out)


def test_a_part_that_fails_says_why_and_the_next_one_runs(proved) -> None:  # noqa: ANN001
    out, found = proved
    assert found["kernels"].status == "failed"
    assert "made to fail on purpose" in found["kernels"].reason
    assert any(line.startswith("Traceback") for line in found["kernels"].error)
    assert "made to fail on purpose" in (out / "kernels.md").read_text()
    assert found["layer"].status == "passed"


def test_a_result_says_where_it_comes_from(proved) -> None:  # noqa: ANN001
    for record in proved[1].values():
        assert set(record.facts["versions"]) >= {"python", "torch", "triton", "megatron-core"}
        assert record.facts["card"] is None
        assert (record.device, record.size, record.budget_minutes) == ("cpu", "tiny", 20.0)
        assert len(record.source["sha256"]) == 64
        assert {"commit", "uncommitted_changes"} <= set(record.source)
        assert 0 < record.seconds < record.limit_seconds


def test_the_layer_s_tables_hold_every_arm_with_tables_ahead_and_graphs(proved) -> None:  # noqa: ANN001
    tables = proved[1]["layer"].tables
    rows = tables["Layer, forward and backward"]
    assert [row["arm"] for row in rows] == ["A", "D0", "E", "F"]
    assert all(row["median_ms"] > 0 and row["saved_bytes"] > 0 for row in rows)
    captures = tables["A step with the discrete path captured, forward and backward"]
    assert [row["arm"] for row in captures] == ["E", "F", "F2", "E2", "F3"]
    assert {row["graph"] for row in captures} == {"RecordedGraph"}  # no CUDA here
    overlaps = tables["Attention and a layer behind it, forward and backward"]
    assert [row["arm"] for row in overlaps] == ["E", "E2"]


def test_the_index_links_the_parts(proved) -> None:  # noqa: ANN001
    index = (proved[0] / "README.md").read_text()
    assert "(layer.md)" in index and "(kernels.json)" in index
    assert index.count("not run") == len(PARTS) - len(PARTS_OF_FAST_TIER)


def test_a_second_call_runs_what_has_not_passed_and_a_third_nothing(proved) -> None:  # noqa: ANN001
    out, first = proved
    code, said = run(out, "--parts", "kernels,layer")
    second = records(out)
    assert code == 0, said
    assert "layer: has passed" in said
    assert second["layer"] == first["layer"]
    assert second["kernels"].status == "passed"
    assert second["kernels"].tables["Search"]
    code, said = run(out, "--parts", "kernels,layer", seconds=30.0)
    assert code == 0
    assert records(out) == second


def test_what_the_budget_does_not_reach_is_written_down(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--budget-min", "0.1", "--parts", "kernels,layer", seconds=60.0)
    assert code == 1, said
    for record in records(tmp_path).values():
        assert (record.status, record.reason) == ("not run", "budget")
        assert record.facts == {} and record.checks == []


def test_a_part_that_does_not_end_in_time_is_ended(tmp_path: Path) -> None:
    code, said = run(tmp_path, "--budget-min", "0.2", "--parts", "train", seconds=90.0)
    record = records(tmp_path, ["train"])["train"]
    assert code == 1, said
    # Ended from outside, or one of its commands was, or what was left had no time.
    assert record.status in ("failed", "incomplete")
    told = (tmp_path / "train.json").read_text()
    assert "time limit" in told or "no time left" in told
    assert record.seconds < 60


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine\n")
    code, said = run(tmp_path, "--parts", "kernels", seconds=60.0)
    assert code == 2
    assert "README.md is not ours" in said
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_a_stop_signal_ends_the_child_and_leaves_what_is_done(proved) -> None:  # noqa: ANN001
    out, _ = proved
    before = (out / "layer.json").read_text()
    process = start(out, "--parts", "correctness,layer")
    for line in process.stdout:
        if line.startswith("correctness: layers"):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, said
    deadline = time.monotonic() + 10
    while any(child.is_running() for child in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(child.is_running() for child in children)
    assert (out / "layer.json").read_text() == before
    stopped = records(out, ["correctness"])["correctness"]
    assert (stopped.status, stopped.reason) == ("incomplete", "stopped by SIGTERM")
    assert "stopped by SIGTERM" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--parts", "layers"], "no part 'layers': choose from correctness, kernels, layer"),
        (["--budget-min", "0"], "give minutes above 0"),
        (["--wheels", "/nowhere"], "holds no wheels.json"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, words: list[str], said: str) -> None:
    code, output = run(tmp_path / "out", *words, seconds=60.0)
    assert code == 2
    assert said in output


@pytest.mark.full
def test_the_whole_proof_at_its_tiny_size(tmp_path: Path) -> None:
    code, said = run(tmp_path, seconds=900.0)
    found = records(tmp_path, [part.name for part in PARTS])
    assert {name: record.reason for name, record in found.items() if record.reason} == {}
    assert code == 0, said
    train, study = found["train"], found["study"]
    assert any(check["name"].startswith("resume is bitwise") for check in train.checks)
    assert sum(r["share"] for r in next(iter(_with(train, "Share of device")))) == pytest.approx(1)
    (differences,) = _with(study, "Validation loss of VQMoE minus")
    assert [row["other"] for row in differences] == ["smoe_top1", "smoe_top2"]
    assert all(row["low"] <= row["mean"] <= row["high"] for row in differences)
    assert (tmp_path / study.figures["page"]).is_file()


def _with(record: Record, beginning: str) -> list[list[dict]]:
    return [rows for title, rows in record.tables.items() if title.startswith(beginning)]
