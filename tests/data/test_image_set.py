"""A prepared set of images: what is checked when it is loaded, and that nothing is replaced."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest
from images_run import cifar_folder, prepare_digits

from vqmoe_megatron.data.image_set import IMAGES_FILE, load_image_set
from vqmoe_megatron.data.prepare_images import prepare_images


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    return prepare_digits(tmp_path)


def test_it_is_mapped_and_has_its_fingerprint(digits: Path) -> None:
    images = load_image_set(digits)
    assert (images.name, images.image_size, images.num_channels) == ("digits", 8, 1)
    assert isinstance(images.split("train").images, np.memmap)
    assert images.split("train").images.shape == (1258, 8, 8, 1)
    assert len(images.fingerprint) == 64 and images.class_names == tuple("0123456789")
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, valid, test"):
        images.split("dev")


def test_the_same_request_again_checks_it_and_writes_nothing(digits: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in digits.iterdir()}
    assert prepare_images("digits", digits, []).fingerprint == load_image_set(digits).fingerprint
    assert {path.name: path.stat().st_mtime_ns for path in digits.iterdir()} == before
    pixels = digits / "test.images.npy"
    content = bytearray(pixels.read_bytes())
    content[-1] ^= 1
    pixels.write_bytes(content)
    load_image_set(digits)  # one pixel is not looked at
    with pytest.raises(ValueError, match=r"test\.images\.npy has sha256"):
        prepare_images("digits", digits, [])


def test_damage_is_named(digits: Path) -> None:
    labels = digits / "train.labels.npy"
    content = labels.read_bytes()
    labels.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"train\.labels\.npy has 10184 bytes, images\.json says"):
        load_image_set(digits)
    labels.unlink()
    with pytest.raises(ValueError, match=r"train\.labels\.npy is missing"):
        load_image_set(digits)
    np.save(labels, np.zeros(1258, np.float64))
    with pytest.raises(ValueError, match=r"holds float64 \[1258\], images\.json says int64"):
        load_image_set(digits)
    description = json.loads((digits / IMAGES_FILE).read_text())
    (digits / IMAGES_FILE).write_text(json.dumps(description | {"format_version": 2}))
    with pytest.raises(ValueError, match="format_version 2, this release reads 1"):
        load_image_set(digits)
    (digits / IMAGES_FILE).write_text("{")
    with pytest.raises(ValueError, match="is damaged or was not written by vqmoe prepare"):
        load_image_set(digits)
    with pytest.raises(ValueError, match="has no images.json: train.task=images reads a folder"):
        load_image_set(digits.parent)


def test_nothing_of_others_is_replaced(digits: Path, tmp_path: Path) -> None:
    folder, *_ = cifar_folder(tmp_path / "cifar")
    with pytest.raises(ValueError, match="holds another set of images .*corpus"):
        prepare_images("cifar10", digits, [folder])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        prepare_images("digits", tmp_path / "full", [])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_disk_that_gets_full_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # in the middle of train's pixels
        with pytest.raises(ValueError, match="digits cannot be written"):
            prepare_digits(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    prepare_digits(tmp_path)
