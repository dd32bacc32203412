"""The shell scripts of docker/: clean, short, and clear about what is missing."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DOCKER = Path(__file__).parents[2] / "docker"
SCRIPTS = sorted(DOCKER.glob("*.sh"))


def run(script: str, *arguments, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DOCKER / script, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_there_are_scripts():
    assert [script.name for script in SCRIPTS] == ["build_apex.sh", "build_without_daemon.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_is_clean_and_the_script_short(script):
    assert len(script.read_text(encoding="utf-8").splitlines()) < 100
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_help_has_an_example():
    done = run("build_without_daemon.sh", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: ") and "\nexample\n" in done.stdout


def test_says_what_the_build_needs(tmp_path):
    """With bash, id and dirname alone on the path: root lacks buildah, others lack root."""
    for tool in ("bash", "id", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done = run("build_without_daemon.sh", PATH=str(tmp_path))
    assert done.returncode == 2
    expected = "needs buildah (Debian: apt-get install buildah)"
    assert (expected if os.geteuid() == 0 else "needs root") in done.stderr


def test_no_apex_unless_asked(tmp_path):
    done = run("build_apex.sh", tmp_path / "wheels", WITH_APEX="0")
    assert done.returncode == 0 and "not built" in done.stdout
    assert list((tmp_path / "wheels").iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"WITH_APEX": "yes"}, "WITH_APEX must be 0 or 1, not 'yes'"),
        ({"WITH_APEX": "1", "APEX_COMMIT": "master"}, "APEX_COMMIT must be a whole commit id"),
    ],
)
def test_apex_refuses_what_is_not_pinned(tmp_path, settings, message):
    done = run("build_apex.sh", tmp_path / "wheels", **settings)
    assert done.returncode == 2 and message in done.stderr


def test_apex_needs_a_cuda_base(tmp_path):
    """With mkdir and grep alone on the path, as a slim base image lacks git and nvcc."""
    for tool in ("mkdir", "grep"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    settings = {"WITH_APEX": "1", "APEX_COMMIT": "a" * 40, "PATH": str(tmp_path)}
    done = run("build_apex.sh", tmp_path / "wheels", **settings)
    assert done.returncode == 2
    assert "needs a CUDA base image" in done.stderr and "git is missing" in done.stderr
