"""Results are bound to the source that ran."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vqmoe_megatron.gpu_proof import card

ROOT = Path(__file__).resolve().parents[2]


def test_the_digest_follows_names_and_content(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "vq").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()

    def digest() -> str:
        return card.source_sha256(package, tmp_path / "recipes")

    (package / "vq" / "a.py").write_text("x = 1\n")
    digests = [digest()]
    (package / "vq" / "a.py").write_text("x = 2\n")
    digests.append(digest())
    (package / "vq" / "a.py").rename(package / "vq" / "b.py")
    digests.append(digest())
    (tmp_path / "recipes" / "r.yaml").write_text("{}\n")
    digests.append(digest())
    (package / "notes.md").write_text("no source\n")
    assert digest() == digests[-1]
    assert len(set(digests)) == 4


def test_without_git_the_commit_is_that_of_the_same_source_carried_along() -> None:
    """In a copy of the package without a repository."""
    program = (
        "from vqmoe_megatron.gpu_proof.card import source_facts as facts, source_sha256 as sha\n"
        "carried = {'commit': 'abc', 'uncommitted_changes': False}\n"
        "print(facts()['commit'])\n"
        "print(facts({**carried, 'sha256': sha()})['commit'])\n"
        "print(facts({**carried, 'sha256': 'other'})['commit'])\n"
    )
    environment = {"PATH": "", "PYTHONPATH": str(ROOT)}  # no git to be found
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["None", "abc", "None"]


def test_the_words_name_the_card_or_the_cpu() -> None:
    versions = {"torch": "2.11.0", "mlflow": None}
    assert card.in_words({"card": None, "versions": versions}) == "CPU; torch 2.11.0"
    found = {"name": "NVIDIA H100", "memory_bytes": 80 * 2**30, "driver": "580", "cuda": "13.0"}
    words = card.in_words({"card": found, "versions": {}})
    assert words.startswith("NVIDIA H100, 80 GiB, driver 580, CUDA 13.0")


def test_the_driver_is_what_nvidia_smi_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert card.driver_version() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.159.04\n")
    tool.chmod(0o755)
    assert card.driver_version() == "580.159.04"
    tool.write_text("#!/bin/sh\necho no device\nexit 9\n")
    assert card.driver_version() is None
