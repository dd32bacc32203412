"""A real ``mlflow server`` on loopback that a test can kill and start again."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

SERVER_START_S = 150


def _free_port() -> int:
    """A free port below those that clients are given: a client that calls a dead server again and
    again would sooner or later get its port for its own end, call itself, and keep the server out.
    """
    for port in random.sample(range(15_000, 32_000), 100):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError:
            continue
    raise RuntimeError("no free port between 15000 and 32000")


class MlflowServer:
    """``mlflow server`` in its own process group; its store stays in ``folder`` over restarts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self, *options: str, allowed_hosts: str = "127.0.0.1:*", **environment: str) -> None:
        """Start and wait until it answers; the test is skipped where it does not."""
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--workers", "1"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--allowed-hosts", allowed_hosts),
            *("--backend-store-uri", f"sqlite:///{self.folder}/server.db"),
            *("--artifacts-destination", str(self.folder / "served")),
            *options,
        ]
        environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # starts in half the time
            **environment,
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                cwd=self.folder,
            )
        deadline = time.monotonic() + SERVER_START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        has_ended = self.process.poll() is not None
        self.kill()
        log_tail = (self.folder / "server.log").read_text(errors="replace")[-500:]
        if has_ended:
            pytest.fail(f"the mlflow server ended by itself: {log_tail}")
        pytest.skip(f"no mlflow server on {self.uri} within {SERVER_START_S} s: {log_tail}")

    def kill(self) -> None:
        """End it at once with all its workers; may be called twice."""
        if self.process is None:
            return
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
