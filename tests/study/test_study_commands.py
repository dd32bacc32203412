"""The commands' help and tables."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from vqmoe_megatron import cli
from vqmoe_megatron.cli import study as commands
from vqmoe_megatron.cli.study import study_app
from vqmoe_megatron.rundir.status import write_status
from vqmoe_megatron.study.study import load_study

NAMES = [command.name or command.callback.__name__ for command in study_app.registered_commands]


def test_all_commands_are_there() -> None:
    assert {"list", "run", "task", "path", "submit", "status"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_shows_an_example(name) -> None:
    shown = CliRunner().invoke(cli.app, ["study", name, "--help"])
    assert shown.exit_code == 0 and f"Example: vqmoe study {name}" in shown.output


def test_the_list_shows_points_ranks_steps_tokens_and_parameters(write_study, vqmoe) -> None:
    code, shown = vqmoe("study", "list", write_study())
    assert code == 0
    header, *rows = shown.splitlines()
    assert header.split() == (
        "index run experts router ranks steps tokens flops parameters active".split()
    )
    first = rows[0].split()
    assert first[:7] == ["0", "experts4-smoe", "4", "smoe", "1", "8", "512"]
    parameters = {row.split()[1]: int(row.split()[8].replace(",", "")) for row in rows[:4]}
    assert parameters["experts8-smoe"] > parameters["experts4-smoe"] > 10_000
    assert rows[-1].startswith("4 runs, rule equal_tokens")


def test_the_list_says_why_sizes_are_unknown(write_study, vqmoe) -> None:
    code, shown = vqmoe("study", "list", write_study(more=["data.path=not/there"]))
    assert code == 0 and "sizes are not known: " in shown and "not/there" in shown


def test_status_shows_every_run(write_study, vqmoe, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    path = write_study()
    study = load_study(path)
    write_status(study.runs[0].run_dir, "completed", 8, "done")
    write_status(study.runs[1].run_dir, "failed", 3, "rank 0 was killed by SIGKILL")
    metrics = '{"iteration": 8, "loss": 5.25, "tokens_per_second": 1234.5}\n'
    (study.runs[0].run_dir / "metrics.jsonl").write_text(metrics)
    code, shown = vqmoe("study", "status", path)
    lines = shown.splitlines()
    assert code == 0
    assert lines[1].split() == ["0", "experts4-smoe", "finished", "8/8", "5.2500", "1234"]
    assert "failed" in lines[2] and "3/8" in lines[2] and "killed by SIGKILL" in lines[2]
    assert lines[-1] == "4 runs: 1 finished, 1 failed, 2 waiting"
    code, shown = vqmoe("study", "status", path, "--watch")  # nothing is active: ends at once
    assert code == 0 and shown.splitlines()[0] == lines[-1]


HOLDER = """
import sys
from pathlib import Path
from vqmoe_megatron.rundir.run_directory import RunDirectory
file = RunDirectory(Path(sys.argv[1])).lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_watch_says_once_why_the_queue_is_not_asked(write_study, vqmoe, monkeypatch) -> None:
    path = write_study()
    study = load_study(path)
    study.start()
    study.folder.slurm_jobs.write_text('[{"job_id": "7", "job_name": "tiny"}]')
    write_status(study.runs[0].run_dir, "running", 3, "training")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            holder.communicate()  # the run dies

    monkeypatch.setattr(commands.time, "sleep", pause)
    command = [sys.executable, "-c", HOLDER, str(study.runs[0].run_dir)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as holder:
        assert holder.stdout.readline() == "locked\n"
        monkeypatch.setenv("PATH", "")
        code, shown = vqmoe("study", "status", path, "--watch")
    assert code == 0 and pauses == [commands.WATCH_SECONDS] * 4
    assert shown.splitlines() == [
        "without Slurm's queue: there is no squeue on PATH",
        "4 runs: 1 running, 3 waiting",
        "4 runs: 1 lost, 3 waiting",
        "4 runs: 1 lost, 3 waiting",
    ]
