"""docker/mlflow_health.py against a real HTTP server that wants a login."""

import base64
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docker" / "mlflow_health.py"
LOGIN = "Basic " + base64.b64encode(b"admin:right").decode()


class _Server(BaseHTTPRequestHandler):
    def do_GET(self):
        is_known = self.headers["Authorization"] == LOGIN
        is_api = self.path.startswith("/api/2.0/mlflow/experiments/search?")
        self.send_response(200 if is_known and is_api else 401)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def url():
    with HTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(*arguments, password="right"):
    environment = {**os.environ, "no_proxy": "*"}
    environment |= {"MLFLOW_AUTH_ADMIN_USERNAME": "admin"}
    environment |= {"MLFLOW_AUTH_ADMIN_PASSWORD": password} if password else {}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_healthy_with_the_login(url):
    assert ask(url).returncode == 0


def test_unhealthy_with_a_wrong_login_and_the_password_is_not_printed(url):
    done = ask(url, password="wr0ng")
    assert done.returncode == 1
    assert "401" in done.stdout and "wr0ng" not in done.stdout + done.stderr


def test_unhealthy_when_nobody_listens():
    done = ask("http://127.0.0.1:9")
    assert done.returncode == 1 and "http://127.0.0.1:9: " in done.stdout


@pytest.mark.parametrize(("arguments", "password"), [([], "right"), (["http://a:1"], None)])
def test_wrong_usage(arguments, password, monkeypatch):
    monkeypatch.delenv("MLFLOW_AUTH_ADMIN_PASSWORD", raising=False)
    done = ask(*arguments, password=password)
    assert done.returncode == 2 and "usage: mlflow_health.py URL" in done.stdout
