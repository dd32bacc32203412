"""metrics.jsonl: exact, strict JSON, and whole after a kill or a resume."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vqmoe_megatron.track.metrics_log import MetricsLog, read_metrics


def refuse_constant(text):
    raise AssertionError(f"{text} is not strict JSON")


def test_floats_come_back_bit_for_bit_and_the_file_is_strict_json(tmp_path):
    values = [0.1 + 0.2, 1e-323, 3.4028235e38, float(np.float32(0.1)), -0.0]
    with MetricsLog(tmp_path) as log:
        for iteration, value in enumerate(values):
            log.append({"iteration": iteration, "loss": value})
        log.append({"iteration": 5, "loss": math.nan, "grad_norm": math.inf, "val/loss": -math.inf})
        log.append({"iteration": np.int64(6), "loss": np.float32(0.1), "consumed_tokens": 2**60})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse_constant)
    records = read_metrics(tmp_path)
    assert [record["loss"].hex() for record in records[:5]] == [value.hex() for value in values]
    assert math.isnan(records[5]["loss"])
    assert records[5]["grad_norm"] == math.inf and records[5]["val/loss"] == -math.inf
    assert records[6] == {"iteration": 6, "loss": float(np.float32(0.1)), "consumed_tokens": 2**60}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"iteration": 1, "lss": 1.0}, "unknown metric"),
        ({"loss": 1.0}, "needs 'iteration'"),
        ({"iteration": 1, "loss": "1.0"}, "loss is a str"),
        ({"iteration": 1, "loss": None}, "loss is a NoneType"),
        ({"iteration": 1, "loss": True}, "loss is a bool"),
    ],
)
def test_a_bad_record_is_refused_and_nothing_is_written(tmp_path, record, says):
    with MetricsLog(tmp_path) as log, pytest.raises(ValueError, match=says):
        log.append(record)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_resume_keeps_the_records_of_the_checkpoint_and_appends_behind_them(tmp_path):
    with MetricsLog(tmp_path) as log:
        for iteration in (10, 20, 30, 40):
            log.append({"iteration": iteration, "loss": float(iteration)})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricsLog(tmp_path) as log:
        assert log.truncate_after(25) == 2
        log.append({"iteration": 30, "loss": 0.5})
        assert log.truncate_after(30) == 0
    after = (tmp_path / "metrics.jsonl").read_bytes()
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [10, 20, 30]
    assert after.startswith(b"".join(before.splitlines(keepends=True)[:2]))
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_half_written_last_line_is_ignored_then_repaired(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 10, "loss": 1.0}\n{"iteration": 20, "lo')
    assert read_metrics(path) == [{"iteration": 10, "loss": 1.0}]
    with MetricsLog(tmp_path) as log:
        assert "half-written" in capsys.readouterr().out
        log.append({"iteration": 20, "loss": 2.0})
    assert [record["loss"] for record in read_metrics(path)] == [1.0, 2.0]


def test_damage_elsewhere_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for damage in ("{broken", "[1]", '{"loss": "abc"}', '{"loss": null}'):
        path.write_text('{"iteration": 10}\n' + damage + '\n{"iteration": 30}\n')
        with pytest.raises(ValueError, match="line 2"):
            read_metrics(path)


def test_resume_goes_on_behind_lines_that_a_power_cut_left(tmp_path, capsys):
    with MetricsLog(tmp_path) as log:
        log.append({"iteration": 1, "loss": 3.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b"\0" * 40 + b"\n[1]\n")
    with MetricsLog(tmp_path) as log:
        assert log.truncate_after(1) == 2
        log.append({"iteration": 2, "loss": 2.0})
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [1, 2]
    assert "removed 2 lines that are no metrics records" in capsys.readouterr().out
    kept = (tmp_path / "metrics.jsonl.before_1").read_bytes()
    assert kept.endswith(b"\0" * 40 + b"\n[1]\n")


def test_somebody_s_notes_are_kept_beside_the_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("my own notes")
    with MetricsLog(tmp_path) as log:
        log.truncate_after(0)
    assert (tmp_path / "metrics.jsonl.before_1").read_text() == "my own notes"
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_kill_minus_9_loses_no_finished_record(tmp_path):
    writer = (
        "import sys\n"
        "from vqmoe_megatron.track.metrics_log import MetricsLog\n"
        "log = MetricsLog(sys.argv[1])\n"
        "for i in range(10**9):\n"
        "    log.append({'iteration': i, 'loss': i / 3})\n"
        "    print(i, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "0\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    confirmed = process.stdout.read().split("\n")[:-1]
    process.wait()
    with MetricsLog(tmp_path) as log:
        log.append({"iteration": 10**9, "loss": 0.0})
    *records, last = read_metrics(tmp_path)
    assert last["iteration"] == 10**9
    assert [record["iteration"] for record in records] == list(range(len(records)))
    assert len(records) > int(confirmed[-1]) > 10
    assert all(record["loss"] == record["iteration"] / 3 for record in records)


FULL_DISK = """
import resource, sys
from vqmoe_megatron.track.metrics_log import MetricsLog

with MetricsLog(sys.argv[1]) as log:
    log.append({"iteration": 1, "loss": 1.0})
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 10, hard))
    for iteration in (2, 3, 4):
        log.append({"iteration": iteration, "loss": 1.0})
    assert len(log.path.read_text().splitlines()) == 1  # and no half line
    log.truncate_after(3)  # a rollback meanwhile
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.append({"iteration": 4, "loss": 2.0})
"""


def test_lines_that_the_disk_refuses_are_written_when_it_has_room_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be written") == 1
    records = read_metrics(tmp_path)
    assert [(r["iteration"], r["loss"]) for r in records] == [(1, 1), (2, 1), (3, 1), (4, 2)]
