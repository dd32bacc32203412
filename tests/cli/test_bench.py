"""The commands: help with an example, refused input, failures as one message, real small runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vqmoe_megatron import cli
from vqmoe_megatron.bench import search_bench, wire_bench
from vqmoe_megatron.bench.cases import GateFailed, RanksFailed

COMMANDS = ("layer", "dispatch", "search", "memory", "wire")
SMALL = ["--num-experts", "4", "--num-codes", "8", "--num-tokens", "16", "--hidden-size", "16",
         "--ffn-hidden-size", "32"]  # fmt: skip


@pytest.fixture
def vqmoe(monkeypatch, capsys):  # noqa: ANN001, ANN201
    """Run the command in this process; return exit code and what was printed."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["vqmoe", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out + shown.err

    return run


def start(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command in a process of its own, as a user does."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vqmoe_megatron.cli", "bench", *arguments],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(vqmoe, command: str) -> None:  # noqa: ANN001
    code, text = vqmoe(command, "--help")
    assert code == 0
    assert f"Example: vqmoe bench {command}" in text


def test_the_commands_are_listed_and_the_rank_is_not(vqmoe) -> None:  # noqa: ANN001
    text = vqmoe("--help")[1]
    assert all(command in text for command in COMMANDS)
    assert "wire-rank" not in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["layer", "--num-tokens", "0"], "num_tokens=0 must be at least 1"),
        (["layer", "--num-experts", "16,x"], "--num-experts '16,x'"),
        (["layer", "--num-experts", "16", "--num-codes", "8"], "num_codes=8 < num_experts=16"),
        (["layer", "--passes", "backward"], "choose from forward, forward_backward"),
        (["layer", "--repeats", "1"], "--repeats 1"),
        (["layer", "--json", "/nowhere/x.json"], "directory does not exist"),
        (["dispatch", "--routing", "even"], "choose from balanced, zipf, one-hot"),
        (["search", "--widths", "0"], "--widths '0'"),
        (["search", "--num-tokens", "-5"], "--num-tokens"),
        (["memory", "--norm", "batch"], "choose from none, separate, shared"),
        (["wire", "--num-experts", "6", "--layouts", "ep4"], "6 % 4 = 2"),
        (["wire", "--layouts", "ep8"], "choose from ep1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message_and_exit_code_2(vqmoe, arguments, expected) -> None:  # noqa: ANN001
    code, text = vqmoe(*arguments)
    assert code == 2
    assert expected in text
    assert "Traceback" not in text


def test_a_failed_gate_is_exit_code_1_and_writes_nothing(vqmoe, monkeypatch, tmp_path) -> None:  # noqa: ANN001
    def fail(*_: object) -> None:
        raise GateFailed("C and A differ")

    monkeypatch.setattr(search_bench, "check_ids", fail)
    code, text = vqmoe("search", "--num-tokens", "8", "--json", str(tmp_path / "r.json"))
    assert code == 1
    assert "no result: C and A differ" in text
    assert not (tmp_path / "r.json").exists()


def wire_row(matches: bool) -> dict:
    return {"arm": "C", "text": "x", "layout": "ep2", "num_experts": 4, "num_codes": 8,
            "num_tokens": 16, "routing": "zipf", "pass": "forward", "wire_bytes": 10,
            "predicted_wire_bytes": 10, "matches": matches}  # fmt: skip


@pytest.mark.parametrize(("matches", "expected"), [(True, 0), (False, 1)])
def test_a_mismatch_is_exit_code_1_and_stays_in_the_file(
    vqmoe,
    monkeypatch,
    tmp_path,
    matches: bool,
    expected: int,  # noqa: ANN001
) -> None:
    monkeypatch.setattr(wire_bench, "measure_wire", lambda *_: [wire_row(matches)])
    code, text = vqmoe("wire", "--json", str(tmp_path / "r.json"))
    assert code == expected
    assert ("not the predicted ones: ep2 C forward" in text) is not matches
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == [wire_row(matches)]


def test_failed_ranks_are_exit_code_1(vqmoe, monkeypatch) -> None:  # noqa: ANN001
    def fail(*_: object) -> None:
        raise RanksFailed("counting on 2 ranks: rank 1 ended with exit code 1")

    monkeypatch.setattr(wire_bench, "measure_wire", fail)
    code, text = vqmoe("wire")
    assert code == 1
    assert "rank 1 ended with exit code 1" in text


def test_layer_as_a_user_runs_it(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("r.json", "r.md", "r.png")]
    options = ["--json", str(files[0]), "--markdown", str(files[1]), "--plot", str(files[2])]
    done = start("layer", *SMALL, "--arms", "A,C,E", "--repeats", "3", *options)
    assert done.returncode == 0, done.stderr
    assert "on cpu; Megatron's arms: local because no CUDA device" in done.stdout
    assert "3 arms agree to" in done.stdout
    rows = json.loads(files[0].read_text())["rows"]
    assert [(row["arm"], row["pass"]) for row in rows] == [
        (arm, name) for name in ("forward", "forward_backward") for arm in "ACE"
    ]
    assert all(file.stat().st_size > 0 for file in files)
    assert "Warning" not in done.stderr


def test_an_unknown_arm_is_refused_in_the_world_too() -> None:
    done = start("memory", *SMALL, "--arms", "Z")
    assert done.returncode == 2
    assert "error: --arms 'Z': choose from A" in done.stderr
    assert "Traceback" not in done.stderr
