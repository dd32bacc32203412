""".dockerignore: what the build needs gets in; data, runs, environments and passwords do not.

The matcher follows Docker's rules: a pattern also matches what is below a folder it names, ``**/``
is any number of folders, ``!`` takes back in, and the last pattern that matches decides.
"""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def translate(pattern: str) -> re.Pattern[str]:
    """Turn one pattern into a regular expression for whole paths."""
    parts = re.split(r"(\*\*/|\*|\[[^]]*\])", pattern)
    named = {"**/": "(?:.*/)?", "*": "[^/]*"}
    body = "".join(p if p.startswith("[") else named.get(p, re.escape(p)) for p in parts)
    return re.compile(f"{body}(?:/.*)?")


def is_sent(path: str) -> bool:
    """Tell whether ``path`` belongs to the build context."""
    sent = True
    for line in (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            takes_back = line.startswith("!")
            if translate(line.removeprefix("!")).fullmatch(path):
                sent = takes_back
    return sent


@pytest.mark.parametrize(
    "path",
    [
        "data/stdlib/train.bin",
        "runs/quickstart/checkpoints/iter_0000100/common.pt",
        "mlflow.db",
        ".venv/bin/python",
        ".git/config",
        "docker/.env",
        "recipes/.env",
        "vqmoe_megatron/.env.local",
        "vqmoe_megatron/vq/__pycache__/search.cpython-311.pyc",
        "vqmoe_megatron/vq/old.pyc",
        "tests/conftest.py",
        "a_file_nobody_thought_of.tar",
    ],
)
def test_stays_outside(path):
    assert not is_sent(path)


def test_every_tracked_source_gets_in():
    listed = subprocess.run(
        ["git", "ls-files", "vqmoe_megatron", "recipes"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip(f"not a git checkout: {listed.stderr.strip()}")
    files = listed.stdout.split()
    assert "vqmoe_megatron/data/corpora.py" in files  # a folder named like what runs write
    assert [path for path in files if not is_sent(path)] == []


def test_what_the_dockerfile_copies_gets_in():
    text = (REPOSITORY / "docker" / "Dockerfile").read_text(encoding="utf-8")
    copied = []
    for arguments in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = [word for word in arguments.split() if not word.startswith("--")]
        copied += [source for source in sources if not source.startswith("/")]
    assert {"setup.cfg", "vqmoe_megatron", "recipes"} <= set(copied)
    assert [source for source in copied if not is_sent(source)] == []
