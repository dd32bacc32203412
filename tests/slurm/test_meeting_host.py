"""Hosts as the shell scripts take them: brackets, addresses, names that nobody knows."""

from __future__ import annotations

import subprocess

import pytest
from shell_run import ROOT, bash, fake_command

TORCHRUN = str(ROOT / "launchers" / "torchrun.sh")


@pytest.mark.parametrize(
    ("text", "plain", "uri"),
    [
        ("n1", "n1", "n1"),
        ("10.0.0.7", "10.0.0.7", "10.0.0.7"),
        ("[::1]", "::1", "[::1]"),
        ("::1", "::1", "[::1]"),
        ("[fe80::1%eth0]", "fe80::1%eth0", "[fe80::1%eth0]"),
        ("[::1", "[::1", "[[::1]"),
        ("", "", ""),
        (" n1 ", "n1", "n1"),
        ("[::1] ", "::1", "[::1]"),
    ],
)
def test_brackets(text, plain, uri) -> None:
    script = f'host=$(plain_host \'{text}\'); echo "$host"; in_uri "$host"'
    assert bash(script, "meeting_host").stdout == f"{plain}\n{uri}\n"


@pytest.mark.parametrize(
    ("host", "known"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("[::1]", False), ("a b", False)]
    + [(host, False) for host in ("*", "0", "0.0.0.0", "::", "")],
)
def test_what_resolves(host, known) -> None:
    assert (bash(f"resolves '{host}'", "meeting_host").returncode == 0) == known


@pytest.fixture
def torchrun(tmp_path):
    """Start it with an interpreter that only shows what it was given."""
    fake_command(tmp_path, "python", 'printf "%s\\n" "$@"')
    (tmp_path / "r.yaml").write_text("")

    def run(**environment: str):
        return subprocess.run(
            [TORCHRUN, "r.yaml"],
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "python"), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize(
    ("host", "shown"),
    [("[::1]", "::1"), ("::1", "::1"), ("localhost", "localhost"), ("127.0.0.1", "127.0.0.1")],
)
def test_torchrun_is_given_a_plain_host(torchrun, host, shown) -> None:
    for nodes in ({}, {"NNODES": "2", "NODE_RANK": "1"}, {"MASTER_PORT": "065"}):
        done = torchrun(MASTER_ADDR=host, **nodes)
        assert done.returncode == 0 and f"--master-addr={shown}" in done.stdout.splitlines()


@pytest.mark.parametrize("host", ["[::1", "127.0.0.1:29500", "::1%lo", "tcp://n1", "a b", "*", "0"])
def test_a_host_that_nobody_knows_is_refused_at_once(torchrun, host) -> None:
    """torchrun itself would wait for minutes, or end in a traceback."""
    for nodes in ({}, {"NNODES": "2", "NODE_RANK": "1"}):
        done = torchrun(MASTER_ADDR=host, **nodes)
        assert done.returncode == 2 and done.stdout == ""
        assert f"MASTER_ADDR={host} is no host that this machine knows" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NNODES", "0"),
        ("NNODES", "two"),
        ("NNODES", "1:4"),
        ("NPROC_PER_NODE", "-1"),
        ("NPROC_PER_NODE", "8.0"),
        ("NODE_RANK", "1"),  # of one node
        ("NODE_RANK", " "),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", "n1"),
        ("MASTER_PORT", "9" * 30),
    ],
)
def test_a_number_that_is_none_is_one_line(torchrun, name, value) -> None:
    done = torchrun(**{name: value})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"torchrun.sh: {name}='{value}' is no whole number from ")
    assert len(done.stderr.splitlines()) == 1
