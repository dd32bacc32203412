"""Every end of a rank is recorded, whatever was raised, and no console is worth a run."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import PARITY, ROOT, TINY

from vqmoe_megatron.checkpoint.folder import find_checkpoint
from vqmoe_megatron.rundir.status import read_status
from vqmoe_megatron.track.metrics_log import read_metrics

# One process, forked once for every end: the imports are what takes time.
ENDS = """
import dataclasses, json, os, sys
from pathlib import Path
from vqmoe_megatron.config.recipe import load_recipe
from vqmoe_megatron.runtime.cpu_compat import install_cpu_compat
from vqmoe_megatron.runtime.world import discover_rank
from vqmoe_megatron.rundir.status import read_status, write_status
from vqmoe_megatron.train.preflight import check_run
from vqmoe_megatron.train.stop_requests import StopRequests
install_cpu_compat()
from torch.distributed.checkpoint.api import CheckpointException
from vqmoe_megatron.train import pretrain

RAISED = {
    "SystemExit": SystemExit(3),
    "SystemExit of success": SystemExit(0),
    "KeyboardInterrupt": KeyboardInterrupt(),
    "GeneratorExit": GeneratorExit(),
    "MemoryError": MemoryError(),
    "CheckpointException": CheckpointException("load", {0: (EOFError("cut"), None)}),
    "RuntimeError": RuntimeError("first line\\nsecond line"),
    "ValueError": ValueError("a refusal"),
    "leaving": None,
}
out, ends = Path(sys.argv[2]), {}
for name, error in RAISED.items():
    folder = out / name
    config = load_recipe(Path(sys.argv[1]), [*sys.argv[3:], f"train.output_dir={folder}"])
    run = check_run(config, 1, "cpu")
    write_status(folder, "running", 7, "training", "abc")
    child = os.fork()
    if child == 0:
        def fail(*arguments, raised=error):
            raise raised
        if error is None:  # everything went well, but the process groups cannot be destroyed
            def pass_by(*arguments): pass
            pretrain.join_world = pretrain.build_process_groups = pass_by
            pretrain._with_the_first_ranks_checkpoint = lambda run: run
            class Done:
                def __init__(self, *arguments): pass
                def resume(self): return []
                def train(self, report): return type("O", (), dict(
                    state="completed", iteration=9, reason="done"))
            class Report(pretrain.RunReport):
                def finish(self, state, iteration, reason): write_status(
                    folder, state, iteration, reason)
            pretrain.Trainer, pretrain._open_report = Done, lambda *arguments: Report()
            pretrain.leave_world = lambda: fail(raised=RuntimeError("Connection closed by peer"))
        else:
            pretrain.join_world = fail
        pretrain.pretrain(run, discover_rank({}), "cpu", StopRequests({}))
        os._exit(99)
    _, how = os.waitpid(child, 0)
    status = read_status(folder)
    ends[name] = [os.waitstatus_to_exitcode(how), status.state, status.iteration, status.reason]
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def ends(small_corpus, tmp_path_factory) -> dict[str, list]:
    out = tmp_path_factory.mktemp("ends")
    command = [sys.executable, "-W", "ignore", "-c", ENDS, str(PARITY), str(out), *TINY]
    done = subprocess.run(
        [*command, f"data.path={small_corpus}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        ("SystemExit", 1, "rank 0: SystemExit: 3"),
        ("SystemExit of success", 1, "rank 0: SystemExit: 0"),
        ("KeyboardInterrupt", 1, "rank 0: KeyboardInterrupt"),
        ("GeneratorExit", 1, "rank 0: GeneratorExit"),
        ("MemoryError", 1, "rank 0: MemoryError"),
        ("CheckpointException", 1, "rank 0: CheckpointException: EOFError('cut')"),
        ("RuntimeError", 1, "rank 0: RuntimeError: first line"),
        ("ValueError", 2, "rank 0: ValueError: a refusal"),
    ],
)
def test_every_end_is_recorded(name, code, reason, ends):
    assert ends[name] == [code, "failed", 7, reason]


def test_a_disorderly_leave_changes_no_completed_run(ends):
    assert ends["leaving"] == [0, "completed", 9, "done"]


def pretrain(run_dir: Path, corpus: Path, *overrides: str) -> list[str]:
    where = [f"data.path={corpus}", f"train.output_dir={run_dir}", "tracking.mlflow=false"]
    return ["pretrain", str(PARITY), *TINY, *where, *overrides]


@pytest.mark.distributed
def test_a_run_without_any_console_completes(small_corpus, tmp_path):
    reader, nobody_reads = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "vqmoe_megatron.cli"]
            + pretrain(tmp_path, small_corpus, "train.train_iters=6"),
            stdout=nobody_reads,
            stderr=full,
            cwd=ROOT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
    os.close(nobody_reads)
    assert done.returncode == 0
    assert read_status(tmp_path).state == "completed"
    assert [record["iteration"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_terminal_that_hangs_up_stops_the_run_with_a_checkpoint(
    num_ranks, small_corpus, tmp_path
):
    """The terminal is the run's own: the kernel sends SIGHUP and its output becomes EIO."""
    command = [sys.executable, "-m", "vqmoe_megatron.cli"]
    command += pretrain(tmp_path, small_corpus, "train.train_iters=4000", "--nproc", str(num_ranks))
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.execve(command[0], command, {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TERM": "xterm"})
    while not (tmp_path / "metrics.jsonl").exists() or len(read_metrics(tmp_path)) < 3:
        os.read(terminal, 65_536)
    os.close(terminal)
    _, how = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(how) == 75
    status = read_status(tmp_path)
    assert (status.state, status.reason) == ("requeue", "received a stop signal")
    assert find_checkpoint(tmp_path).name == f"iter_{status.iteration:07d}"
