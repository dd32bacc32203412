"""The CPU image for real: built by buildah, trained in, stopped by a signal, serving MLflow.

Needs root, buildah and debootstrap. BASE_ARCHIVE=FILE.tar keeps debootstrap's base between calls;
STORAGE_DRIVER=overlay is faster than vfs where the kernel allows it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from vqmoe_megatron import __version__

REPOSITORY = Path(__file__).parents[2]
BUILD_TIMEOUT_S = 1800
WAIT_S = 300


@dataclass
class Image:
    """The built image, a container of it, and what the build script printed."""

    buildah: list[str]
    container: str
    root: Path  # the container's file system as this machine sees it
    printed: str

    def start(self, *command: str, workdir: str = "/workspace") -> subprocess.Popen[str]:
        options = ["--isolation", "chroot", "--workingdir", workdir, self.container, "--"]
        return subprocess.Popen(
            [*self.buildah, "run", *options, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> str:
        """Run a command to its end; its output. Fails the test unless it exits with 0."""
        process = self.start(*command)
        printed, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, printed
        return printed


@pytest.fixture(scope="module")
def image(only_on_request, tmp_path_factory) -> Iterator[Image]:
    if os.geteuid() != 0:
        pytest.skip("building an image with chroot isolation needs root")
    for tool in ("buildah", "debootstrap"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: apt-get install {tool})")
    store = tmp_path_factory.mktemp("images")
    environment = {**os.environ, "STORE": str(store), "IMAGE": "localhost/vqmoe:test"}
    driver = ["--storage-driver", os.environ.get("STORAGE_DRIVER", "vfs")]
    buildah = ["buildah", *driver, "--root", f"{store}/root", "--runroot", f"{store}/run"]

    def ask(*arguments: str) -> str:
        return subprocess.run(
            [*buildah, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        built = subprocess.run(
            [REPOSITORY / "docker" / "build_without_daemon.sh"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=BUILD_TIMEOUT_S,
        )
        assert built.returncode == 0, built.stdout[-6000:]
        container = ask("from", "localhost/vqmoe:test")
        root = Path(ask("mount", container))
        image = Image(buildah, container, root, built.stdout)
        image.run("vqmoe", "prepare", "stdlib", "--out", "data/stdlib")
        yield image
    finally:
        subprocess.run([*buildah, "rm", "--all"], capture_output=True)
        shutil.rmtree(store, ignore_errors=True)


def pids_of(marker: str) -> list[int]:
    """Processes of Python with ``marker`` among their arguments, oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # ended meanwhile
        if b"python" in arguments[0] and any(marker.encode() in one for one in arguments):
            found.append(int(folder.name))
    return sorted(found)


def wait_until(what: str, is_true) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s for {what}"
        time.sleep(0.5)


def test_the_script_trained_ten_steps_as_the_images_user(image):
    assert "uid=10001(vqmoe) gid=10001(vqmoe)" in image.printed
    assert "vqmoe doctor" in image.printed and "the tested version" in image.printed
    status = json.loads(image.printed[image.printed.rindex("{") :])
    assert (status["state"], status["iteration"]) == ("completed", 10)


def test_configuration_is_what_the_dockerfile_says_and_nothing_of_this_machine(image):
    printed = subprocess.run(
        [*image.buildah, "inspect", "--type", "image", "localhost/vqmoe:test"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    config = json.loads(printed)["OCIv1"]["config"]
    assert config["Entrypoint"] == ["vqmoe"] and config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    names = {setting.partition("=")[0] for setting in config["Env"]}
    assert {"HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR"} <= names
    assert not names & {"PIP_CERT", "PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"}
    source = sorted(path.name for path in (image.root / "opt/vqmoe/source").iterdir())
    assert {"setup.cfg", "vqmoe_megatron"} <= set(source)
    assert not {"data", "runs", "tests", ".git", ".venv"} & set(source)


def test_pip_inside_cannot_replace_torch(image):
    torch = (image.root / "opt/vqmoe/constraints.txt").read_text().strip()
    process = image.start("python", "-m", "pip", "install", "--dry-run", "torch==1.0")
    printed, _ = process.communicate(timeout=WAIT_S)
    assert process.returncode != 0
    assert f"(constraint) {torch}" in printed


def test_sigterm_saves_and_asks_for_a_requeue(image):
    out = "runs/stopped"
    arguments = ["recipes/quickstart.yaml", "--nproc", "2", "train.train_iters=2000"]
    arguments += ["train.log_interval=1", "train.eval_interval=1000", "train.eval_iters=1"]
    process = image.start("vqmoe", "pretrain", *arguments, f"train.output_dir={out}")
    metrics = image.root / "workspace" / out / "metrics.jsonl"
    wait_until("two logged steps", lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    os.kill(pids_of(f"train.output_dir={out}")[0], signal.SIGTERM)
    printed, _ = process.communicate(timeout=WAIT_S)
    status = json.loads((metrics.parent / "status.json").read_text())
    assert status["state"] == "requeue", printed[-3000:]
    assert process.returncode == 75
    saved = f"checkpoints/iter_{status['iteration']:07d}"
    assert (metrics.parent / saved).is_dir()


def test_composes_server_wants_a_login_and_takes_a_run(image):
    """compose.yaml's own command and health check, on a free port of this machine."""
    server = yaml.safe_load((REPOSITORY / "docker/compose.yaml").read_text())["services"]["mlflow"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, password = f"http://127.0.0.1:{port}", secrets.token_hex(16)
    command = [
        option.replace("--port=5000", f"--port={port}").replace(
            "127.0.0.1:5000", f"127.0.0.1:{port}"
        )
        for option in [*server["entrypoint"], *server["command"]]
    ]
    login = ["MLFLOW_AUTH_ADMIN_USERNAME=admin", f"MLFLOW_AUTH_ADMIN_PASSWORD={password}"]
    secret = f"MLFLOW_FLASK_SERVER_SECRET_KEY={secrets.token_hex(16)}"
    process = image.start("env", *login, secret, *command, workdir=server["working_dir"])
    script = server["healthcheck"]["test"][2]

    def is_healthy() -> bool:
        assert process.poll() is None, process.stdout.read()
        asked = image.start("env", *login, "python", script, url)
        asked.communicate(timeout=WAIT_S)
        return asked.returncode == 0

    try:
        wait_until("the server", is_healthy)
        wrong = image.start("env", login[0], "MLFLOW_AUTH_ADMIN_PASSWORD=x", "python", script, url)
        printed, _ = wrong.communicate(timeout=WAIT_S)
        assert wrong.returncode == 1 and "401" in printed
        client = ["MLFLOW_TRACKING_USERNAME=admin", f"MLFLOW_TRACKING_PASSWORD={password}"]
        image.run(
            *("env", *client, "vqmoe", "pretrain", "recipes/quickstart.yaml", "--nproc", "2"),
            *("train.train_iters=10", "train.log_interval=1", "optimizer.lr_warmup_iters=2"),
            *("train.output_dir=runs/tracked", f"tracking.mlflow_uri={url}"),
        )
        run = json.loads((image.root / "workspace/runs/tracked/status.json").read_text())
        history = "import sys; from mlflow import MlflowClient as C; " + (
            "print([m.step for m in C(sys.argv[1]).get_metric_history(sys.argv[2], 'loss')])"
        )
        steps = image.run("env", *client, "python", "-c", history, url, run["mlflow_run_id"])
        assert steps.splitlines()[-1] == str(list(range(1, 11)))
    finally:
        for pid in pids_of(str(port)):
            os.kill(pid, signal.SIGTERM)
        process.wait(timeout=WAIT_S)
