"""Run ``vqmoe`` commands in one process, and each simulation they ask for in a fork of it.

A simulation starts a process of its own and pays for the imports; here they are paid once. The
command, the job's files and the simulated rank are the product's own.

    python forked_commands.py FOLDER

FOLDER holds ``commands.json``, {name: words behind ``vqmoe``}; NAME.json appears beside it,
[exit code, standard output, standard error].
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

from vqmoe_megatron import cli
from vqmoe_megatron.simulate import simulated_rank, simulated_step


def fork_instead(command: list[str], stdout: Any, **_: Any) -> subprocess.CompletedProcess:
    """In the place of ``subprocess.run``: the simulating module's ``main`` in a fork."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stdout.fileno(), 2)
            simulated_rank.run_job(Path(command[-1]))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return subprocess.CompletedProcess(command, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def run(words: list[str]) -> list[Any]:
    """Exit code, standard output, standard error of ``vqmoe WORDS``."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with mock.patch.object(sys, "argv", ["vqmoe", *words]):
            try:
                cli.main()
            except SystemExit as ended:
                code = ended.code
    return [code, out.getvalue(), err.getvalue()]


def main(folder: Path) -> None:
    """Run every command of the folder, in order."""
    simulated_rank.install_cpu_compat()
    for name in ("engines.megatron.engine", "simulate.engines", "runtime.cpu_compat.fake_world"):
        importlib.import_module(f"vqmoe_megatron.{name}")
    with mock.patch.object(simulated_step.subprocess, "run", fork_instead):
        for name, words in json.loads((folder / "commands.json").read_text()).items():
            (folder / f"{name}.json").write_text(json.dumps(run(words)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
