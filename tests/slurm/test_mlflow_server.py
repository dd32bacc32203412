"""The server's job: files named right, an address that is a URL, and no waiting for ever."""

from __future__ import annotations

import sys

import pytest
from shell_run import ROOT, bash, fake_command

from vqmoe_megatron.track.mlflow.sqlite_uri import sqlite_path


@pytest.fixture
def serve(tmp_path):
    """``serve(host, script)``: with a python whose server only notes how it was called."""
    tools = tmp_path / "tools"
    tools.mkdir()
    fake_command(
        tools,
        "python",
        f'if [[ "$1" == -m ]]; then printf "%s\\n" "$@" >\'{tools}/called\'; exec sleep 60; fi\n'
        f"exec '{sys.executable}' \"$@\"",
    )
    fake_command(tools, "getent", "[[ $2 != unknown ]]")

    def run(folder: str, script: str, host: str = "n1"):
        done = bash(
            f"{script}\nserve_mlflow '{ROOT}' '{folder}'",
            "slurm_world",
            "mlflow_server",
            cwd=tmp_path,
            PATH=f"{tools}:/usr/bin:/bin",
            PYTHON=str(tools / "python"),
            MASTER_ADDR=host,
            SLURM_JOB_ID="7",
        )
        called = tools / "called"
        return done, called.read_text().splitlines() if called.exists() else []

    return run


NEVER = "answers() { sleep 0.5; SECONDS=400; return 1; }"  # as if 300 s had gone
GONE = "answers() { sleep 0.5; kill -KILL $server; sleep 0.2; return 1; }"


def option(called: list[str], name: str) -> str:
    return called[called.index(name) + 1]


@pytest.mark.parametrize("folder", ["plain", "a server?%41#ü", 'it is" mine/b', "x&y=z;w"])
def test_the_files_are_named_right(serve, tmp_path, folder) -> None:
    _, called = serve(folder, NEVER)
    place = (tmp_path / folder).resolve()
    assert sqlite_path(option(called, "--backend-store-uri")) == place / "mlflow.db"
    assert option(called, "--artifacts-destination") == (place / "artifacts").as_uri()


@pytest.mark.parametrize(
    ("host", "listen", "shown"),
    [("n1", "0.0.0.0", "n1"), ("[fd00::2]", "::", "[fd00::2]"), ("::1", "::", "[::1]")],
)
def test_its_address_is_a_url(serve, host, listen, shown) -> None:
    done, called = serve("s", NEVER, host)
    assert option(called, "--host") == listen
    assert option(called, "--allowed-hosts").startswith(f"{shown}:20112,localhost:20112,")
    assert f"no answer at http://{shown}:20112 in 300 s" in done.stderr


@pytest.mark.parametrize(
    ("script", "host", "code", "message"),
    [
        (NEVER, "n1", 1, "error: no answer at http://n1:20112 in 300 s; if n1 is not this node"),
        (GONE, "n1", 1, "error: the MLflow server ended; see above"),
        ("", "unknown", 2, "error: VQMOE_MLFLOW_HOST=unknown is no host that this node knows"),
    ],
)
def test_a_server_that_does_not_answer_ends_the_job(
    serve, tmp_path, script, host, code, message
) -> None:
    done, _ = serve("s", script, host)
    assert done.returncode == code and message in done.stderr, done.stderr
    assert not (tmp_path / "s" / "uri").exists()
