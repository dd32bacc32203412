"""``vqmoe`` commands in forks of the process that ranks are forked from, whose imports are paid.

The command, its files and its exit code are the product's own; what a fork cannot show is a start
from nothing. So what is about starting, signals or imports uses ``small_run.start_vqmoe``, and the
documented commands start as a user starts them.

    done = vqmoe("export", run_dir, "--hf", folder)
    assert done.returncode == 0, done.stderr
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from gloo_ranks import ROOT, warm_context

STREAMS = ("stdin", "stdout", "stderr")  # by their descriptors


def vqmoe(
    *words: object, text: str = "", timeout_seconds: float = 300.0
) -> subprocess.CompletedProcess:
    """Run ``vqmoe WORDS`` in the repository, ``text`` on its standard input."""
    command = ["vqmoe", *map(str, words)]
    with tempfile.TemporaryDirectory(prefix="forked_vqmoe_") as temporary:
        folder = Path(temporary)
        for name in STREAMS:
            (folder / name).write_text(text if name == "stdin" else "")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = warm_context().Process(target=_run, args=(command, folder, environment))
        process.start()
        process.join(timeout_seconds)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout_seconds)
        out, err = ((folder / name).read_text() for name in STREAMS[1:])
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def _run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor, name in enumerate(STREAMS):
        opened = os.open(folder / name, os.O_RDONLY if descriptor == 0 else os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    code: object = 1
    try:
        from vqmoe_megatron.cli import main

        sys.argv = command
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))
