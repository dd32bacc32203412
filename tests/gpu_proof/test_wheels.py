"""Carried wheels: checked before they are used, installed without a network."""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest

from vqmoe_megatron.gpu_proof.wheels import (
    BUILT_WHEELS,
    MANIFEST,
    WHEELS,
    _fits,
    download_wheels,
    install_wheels,
    read_manifest,
)

WHEEL = "carried_toy-1.0-py3-none-any.whl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One wheel of our own, with its manifest."""
    path = tmp_path / "wheels"
    path.mkdir()
    with zipfile.ZipFile(path / WHEEL, "w") as wheel:
        wheel.writestr("carried_toy.py", "ANSWER = 42\n")
        head = "carried_toy-1.0.dist-info"
        wheel.writestr(
            f"{head}/METADATA", "Metadata-Version: 2.1\nName: carried-toy\nVersion: 1.0\n"
        )
        tags = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{head}/WHEEL", tags)
        wheel.writestr(f"{head}/RECORD", "")
    digest = hashlib.sha256((path / WHEEL).read_bytes()).hexdigest()
    manifest = {"python": "3.12", "source": {"sha256": "a" * 64}, "sha256": {WHEEL: digest}}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def test_what_is_installed_can_be_imported_from_its_folder_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(read_manifest(folder)["sha256"]) == [WHEEL]
    install_wheels(folder, tmp_path / "target")
    monkeypatch.syspath_prepend(str(tmp_path / "target"))
    import carried_toy

    assert carried_toy.ANSWER == 42
    assert str(tmp_path) in sys.modules["carried_toy"].__file__


def test_a_wheel_that_is_none_is_refused_with_what_pip_says(folder: Path, tmp_path: Path) -> None:
    (folder / WHEEL).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="pip could not install"):
        install_wheels(folder, tmp_path / "target")


def _changed(folder: Path) -> None:
    (folder / WHEEL).write_bytes(b"damaged")


def _unlisted(folder: Path) -> None:
    (folder / "other-1.0-py3-none-any.whl").touch()


def _missing(folder: Path) -> None:
    (folder / WHEEL).unlink()


def _no_json(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def _no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_changed, "differs from its checksum"),
        (_unlisted, "there or listed, but not both"),
        (_missing, "there or listed, but not both"),
        (_no_json, "cannot be read"),
        (_no_manifest, "holds no wheels.json"),
    ],
)
def test_a_folder_that_is_not_as_it_was_made_is_refused(folder: Path, damage, message) -> None:  # noqa: ANN001
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_manifest(folder)


def test_files_of_others_are_never_replaced(folder: Path) -> None:
    (folder / "notes.txt").touch()
    with pytest.raises(ValueError, match="notes.txt, which is not ours"):
        download_wheels(folder)
    assert (folder / WHEEL).is_file()


def test_every_wheel_has_one_exact_version() -> None:
    assert all(requirement.count("==") == 1 for requirement in (*WHEELS, *BUILT_WHEELS))


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("a-1.0-py3-none-any.whl", True),
        ("a-1.0-cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", True),
        ("a-1.0-cp311-cp311-manylinux_2_17_x86_64.whl", False),
        ("a-1.0-cp312-cp312-manylinux_2_17_aarch64.whl", False),
    ],
)
def test_what_runs_on_the_lent_machine(name: str, fits: bool) -> None:
    assert _fits(name) is fits
