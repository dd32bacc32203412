"""What a prepared set of images is, and how it is loaded: ``images.json`` read, sizes checked.

Imports neither torch nor megatron, so that a broken folder is refused before any rank starts.

    DIR/images.json             what is here; the folder gets its name when all of it is whole
    DIR/SPLIT.images.npy        uint8 [n, height, width, channels]
    DIR/SPLIT.labels.npy        int64 [n], 0 .. number of classes - 1

All images have one size. Splits are train, valid and test, of which train and one more are there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT_VERSION = 1
IMAGES_FILE = "images.json"
SPLITS = ("train", "valid", "test")
READ_BYTES = 2**22


@dataclass(frozen=True)
class ImageSplit:
    """One split; its arrays are mapped from the disk when they are asked for."""

    name: str
    folder: Path
    num_images: int

    @property
    def images(self) -> np.ndarray:
        """uint8 ``[num_images, height, width, channels]``."""
        return np.load(self.folder / images_name(self.name), mmap_mode="r")

    @property
    def labels(self) -> np.ndarray:
        """int64 ``[num_images]``."""
        return np.load(self.folder / labels_name(self.name), mmap_mode="r")


@dataclass(frozen=True)
class ImageSet:
    """A complete prepared set. ``content``: of its ``images.json``."""

    path: Path
    name: str
    image_size: int  # pixels, of height and width
    num_channels: int
    class_names: tuple[str, ...]
    channel_mean: tuple[float, ...]  # of the train split, pixels as 0 .. 1
    channel_std: tuple[float, ...]
    splits: dict[str, ImageSplit]
    content: bytes

    @property
    def fingerprint(self) -> str:
        """sha256 of ``images.json``, 64 hex digits."""
        return hashlib.sha256(self.content).hexdigest()

    def split(self, name: str) -> ImageSplit:
        """Return a split; ``ValueError`` naming the existing ones if there is none of that name."""
        if name not in self.splits:
            legal = ", ".join(self.splits)
            raise ValueError(f"{self.path} has no split {name!r}; it has {legal}")
        return self.splits[name]


def images_name(split: str) -> str:
    """File of a split's pixels."""
    return f"{split}.images.npy"


def labels_name(split: str) -> str:
    """File of a split's classes."""
    return f"{split}.labels.npy"


def load_image_set(path: str | Path) -> ImageSet:
    """Return the set prepared in directory ``path``.

    Raises ``ValueError`` when there is none, ``images.json`` is damaged, or a file is missing, has
    another size than recorded, or is an array of another shape or type. Reads the headers of arrays
    and no pixels: :func:`check_files` does. Does not communicate.
    """
    path = Path(path)
    if not (path / IMAGES_FILE).is_file():
        raise ValueError(
            f"{path} has no {IMAGES_FILE}: train.task=images reads a folder that vqmoe prepare "
            f"made of images, for instance: vqmoe prepare digits --out {path}"
        )
    try:
        content = (path / IMAGES_FILE).read_bytes()
        found = json.loads(content)
        if found["format_version"] != FORMAT_VERSION:
            raise ValueError(
                f"{path / IMAGES_FILE} has format_version {found['format_version']}, this release "
                f"reads {FORMAT_VERSION}; prepare the images again in another directory"
            )
        images = ImageSet(
            path=path,
            name=found["corpus"],
            image_size=int(found["image_size"]),
            num_channels=int(found["num_channels"]),
            class_names=tuple(found["class_names"]),
            channel_mean=tuple(map(float, found["channel_mean"])),
            channel_std=tuple(map(float, found["channel_std"])),
            splits={
                name: ImageSplit(name, path, int(split["num_images"]))
                for name, split in found["splits"].items()
            },
            content=content,
        )
        recorded = recorded_files(found)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path / IMAGES_FILE} is damaged or was not written by vqmoe prepare ({error!r}); "
            "prepare the images again in another directory"
        ) from error
    for name, (num_bytes, _) in recorded.items():
        _check_size(path / name, num_bytes)
    for split in images.splits.values():
        _check_arrays(images, split)
    return images


def recorded_files(description: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Size in bytes and sha256 of every file, of a parsed ``images.json``."""
    return {
        name: (int(file["num_bytes"]), str(file["sha256"]))
        for split in description["splits"].values()
        for name, file in split["files"].items()
    }


def check_files(images: ImageSet) -> None:
    """Read every file and compare its sha256 with the recorded one; ``ValueError`` otherwise."""
    for name, (_, wanted) in recorded_files(json.loads(images.content)).items():
        if (found := file_sha256(images.path / name)) != wanted:
            raise ValueError(
                f"{images.path / name} has sha256 {found}, {IMAGES_FILE} says {wanted}: it was "
                "changed or is damaged; prepare the images again in another directory"
            )


def file_sha256(path: Path) -> str:
    """64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_size(path: Path, expected_bytes: int) -> None:
    found_bytes = path.stat().st_size if path.is_file() else None
    if found_bytes != expected_bytes:
        what = "is missing" if found_bytes is None else f"has {found_bytes} bytes"
        raise ValueError(
            f"{path} {what}, {IMAGES_FILE} says {expected_bytes} bytes: the folder is cut or mixed "
            "up; prepare the images again in another directory"
        )


def _check_arrays(images: ImageSet, split: ImageSplit) -> None:
    pixels = (split.num_images, images.image_size, images.image_size, images.num_channels)
    for name, shape, dtype in (
        (images_name(split.name), pixels, np.uint8),
        (labels_name(split.name), (split.num_images,), np.int64),
    ):
        try:
            array = np.load(split.folder / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{split.folder / name} is no .npy file: {error}") from error
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{split.folder / name} holds {array.dtype} {list(array.shape)}, {IMAGES_FILE} "
                f"says {np.dtype(dtype)} {list(shape)}; prepare the images again in another "
                "directory"
            )
