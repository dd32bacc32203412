"""The images we can prepare: where they come from and how they are split.

- digits: 1,797 of 8 x 8, grey, UCI's test set of digits, which scikit-learn ships. Of image i, in
  the order of the package, test if i mod 5 = 4 (359), valid if i mod 10 = 3 (180), else train
  (1,258).
- cifar10: one ``--input``, the folder of the binary version, ``cifar-10-batches-bin``.
  ``test_batch.bin`` is test; of ``data_batch_*.bin``, in order, the last tenth is valid (5,000 of
  50,000), the rest train. A record is 1 byte of label and 3,072 of pixels, 1,024 of each colour,
  row by row: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
- images: one ``--input``, a folder of class sub-folders of png or jpg:
  ``INPUT/{train,valid|val,test}/CLASS/FILE`` as given, or ``INPUT/CLASS/FILE``, split by the sha256
  of CLASS/FILE: 90 % train, 5 % valid, 5 % test. Classes are numbered in the order of their names.
  Each image is turned to RGB, scaled so that its shorter side is ``--image-size``, and cut to the
  square in its middle. Needs Pillow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqmoe_megatron.data.image_set import SPLITS
from vqmoe_megatron.runtime.optional_packages import require

CIFAR_SIZE, CIFAR_CHANNELS, CIFAR_CLASSES = 32, 3, 10
CIFAR_PIXELS = (CIFAR_CHANNELS, CIFAR_SIZE, CIFAR_SIZE)
CIFAR_RECORD = np.dtype([("label", "u1"), ("pixels", "u1", CIFAR_PIXELS)])
CIFAR_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SUFFIXES = (".png", ".jpg", ".jpeg")
WIDE_MODES = ("I", "F")  # Pillow's, of numbers wider than a byte
SPLIT_FOLDERS = {"train": "train", "valid": "valid", "val": "valid", "test": "test"}
IMAGE_SETS = ("digits", "cifar10", "images")

Image = tuple[np.ndarray, int]  # uint8 [height, width, channels], label


@dataclass(frozen=True)
class ImageSource:
    """Images to prepare: counts, and a function for each split that yields its images in order."""

    image_size: int
    num_channels: int
    class_names: tuple[str, ...]
    num_images: dict[str, int]
    read: dict[str, Callable[[], Iterator[Image]]]
    description: dict[str, Any] = field(default_factory=dict)


def check_image_request(name: str, inputs: list[Path], image_size: int | None) -> None:
    """Raise ``ValueError`` for inputs or a size that do not fit the set."""
    if name == "digits" and inputs:
        raise ValueError("digits takes no --input: they are read from the installed scikit-learn")
    if name != "digits" and len(inputs) != 1:
        raise ValueError(f"{name} needs one --input, a folder, not {len(inputs)}")
    if name == "images" and (image_size is None or not 1 <= image_size <= 4096):
        raise ValueError("images needs --image-size, pixels of height and width from 1 to 4096")
    if name != "images" and image_size is not None:
        raise ValueError(f"{name} has its own size; leave out --image-size")


def open_images(name: str, inputs: list[Path], image_size: int | None) -> ImageSource:
    """Find and split the images of a set that :func:`check_image_request` has passed.

    Raises:
        ValueError: for input that is missing, cut or altered, or a package that is not installed.
    """
    if name == "digits":
        return _digits()
    if not inputs[0].is_dir():
        raise ValueError(f"--input {inputs[0]} is no folder")
    return _cifar10(inputs[0]) if name == "cifar10" else _image_folder(inputs[0], image_size)


def _digits() -> ImageSource:
    require("sklearn", "vqmoe prepare digits")
    from sklearn.datasets import load_digits

    found = load_digits()
    # 0 .. 16 become 0 .. 255
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = found.target.astype(np.int64)
    number = np.arange(len(labels))
    is_test = number % 5 == 4
    is_valid = number % 10 == 3
    chosen = {"train": ~(is_test | is_valid), "valid": is_valid, "test": is_test}
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    return ImageSource(
        image_size=8,
        num_channels=1,
        class_names=tuple(map(str, range(10))),
        num_images={split: int(mask.sum()) for split, mask in chosen.items()},
        read={split: partial(_pairs, pixels[mask], labels[mask]) for split, mask in chosen.items()},
        description={"package": "scikit-learn", "sha256": digest},
    )


def _pairs(pixels: np.ndarray, labels: np.ndarray) -> Iterator[Image]:
    """Of pixels [n, height, width, channels] and labels [n]."""
    return zip(pixels, map(int, labels), strict=True)


def _cifar10(folder: Path) -> ImageSource:
    if (inner := folder / "cifar-10-batches-bin").is_dir():
        folder = inner
    batches = sorted(folder.glob("data_batch_*.bin"))
    test = folder / "test_batch.bin"
    if not batches or not test.is_file():
        raise ValueError(
            f"{folder} lacks data_batch_*.bin or test_batch.bin; give the folder of CIFAR-10's "
            "binary version (cifar-10-binary.tar.gz), unpacked"
        )
    train = [read_records(path) for path in batches]
    records = np.concatenate(train) if len(train) > 1 else train[0]
    first_valid = len(records) - max(1, len(records) // 10)
    if not first_valid:
        raise ValueError(f"{folder} holds {len(records)} training image; two are the fewest")
    parts = {
        "train": records[:first_valid],
        "valid": records[first_valid:],
        "test": read_records(test),
    }
    return ImageSource(
        image_size=CIFAR_SIZE,
        num_channels=CIFAR_CHANNELS,
        class_names=CIFAR_NAMES,
        num_images={split: len(part) for split, part in parts.items()},
        read={
            split: partial(_pairs, part["pixels"].transpose(0, 2, 3, 1), part["label"])
            for split, part in parts.items()
        },
        description={
            "inputs": [
                {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                for path in (*batches, test)
            ]
        },
    )


def read_records(path: Path) -> np.ndarray:
    """Map the records of one file of CIFAR-10's binary version, ``[n]`` of ``CIFAR_RECORD``.

    Raises:
        ValueError: for a size that is no whole number of records, or a label above 9.
    """
    num_bytes, size = path.stat().st_size, CIFAR_RECORD.itemsize
    if not num_bytes or num_bytes % size:
        raise ValueError(
            f"{path} has {num_bytes} bytes, no whole number of records of {size}: it is cut, or "
            "not of CIFAR-10's binary version"
        )
    records = np.memmap(path, dtype=CIFAR_RECORD, mode="r")
    if (highest := int(records["label"].max())) >= CIFAR_CLASSES:
        raise ValueError(
            f"{path} has label {highest}, CIFAR-10 has {CIFAR_CLASSES} classes from 0; it is not "
            "of its binary version (that of CIFAR-100 has records of 3,074 bytes)"
        )
    return records


def _image_folder(folder: Path, image_size: int) -> ImageSource:
    require("PIL", "vqmoe prepare images")
    named = sorted(p for p in folder.iterdir() if p.name in SPLIT_FOLDERS and p.is_dir())
    by_name = {path.name: _files_by_class(path) for path in named}
    of_splits = [name for name, classes in by_name.items() if classes]  # others may be classes
    given = {SPLIT_FOLDERS[name]: by_name[name] for name in of_splits}
    if len(given) < len(of_splits):
        raise ValueError(f"{folder} has both valid and val, one split under two names; leave one")
    if "train" in given:
        found = {split: given[split] for split in SPLITS if split in given}
        files = {
            split: [(name, path) for name, paths in classes.items() for path in paths]
            for split, classes in found.items()
        }
        classes = sorted(found["train"])
        if unknown := sorted({name for each in found.values() for name in each} - set(classes)):
            raise ValueError(
                f"{folder}: train has no class {', '.join(unknown[:3])}, which another split has"
            )
    elif given:
        raise ValueError(
            f"{folder} has classes in {', '.join(of_splits)} and none in "
            "train; lay files out as INPUT/CLASS/FILE or INPUT/{train,valid,test}/CLASS/FILE"
        )
    else:
        found_classes = _files_by_class(folder)
        classes, files = sorted(found_classes), {split: [] for split in SPLITS}
        for name, paths in found_classes.items():
            for path in paths:
                files[folder_split(f"{name}/{path.name}")].append((name, path))
    if len(classes) < 2:
        raise ValueError(
            f"{folder} holds {len(classes)} class sub-folder(s) of png or jpg, two are the fewest; "
            "lay files out as INPUT/CLASS/FILE or INPUT/{train,valid,test}/CLASS/FILE"
        )
    files = {split: listed for split, listed in files.items() if listed}
    if "train" not in files or len(files) < 2:
        raise ValueError(
            f"{folder} has images for {', '.join(files) or 'no split'} only; train and one of "
            "valid and test are needed: name the folders of splits, or add images"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return ImageSource(
        image_size=image_size,
        num_channels=3,
        class_names=tuple(classes),
        num_images={split: len(listed) for split, listed in files.items()},
        read={
            split: partial(_read_files, listed, numbers, image_size)
            for split, listed in files.items()
        },
        description={"num_files": sum(map(len, files.values())), "sha256": _digest_of(files)},
    )


def _digest_of(files: dict[str, list[tuple[str, Path]]]) -> str:
    """sha256 of every split, class, file name and size in bytes: enough to tell folders apart."""
    digest = hashlib.sha256()
    for split, listed in files.items():
        for name, path in listed:
            digest.update(f"{split}\0{name}\0{path.name}\0{path.stat().st_size}\0".encode())
    return digest.hexdigest()


def _files_by_class(folder: Path) -> dict[str, list[Path]]:
    """Images of every class sub-folder that has any, by name, both in order."""
    found = {
        entry.name: sorted(p for p in entry.iterdir() if p.suffix.lower() in SUFFIXES)
        for entry in sorted(folder.iterdir())
        if entry.is_dir()
    }
    return {name: paths for name, paths in found.items() if paths}


def folder_split(name: str) -> str:
    """Return the split of ``CLASS/FILE``, by its hash alone."""
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    return "train" if share < 0.9 else "valid" if share < 0.95 else "test"


def _read_files(
    files: list[tuple[str, Path]], numbers: dict[str, int], image_size: int
) -> Iterator[Image]:
    from PIL import Image as Pillow

    for name, path in files:
        try:
            with Pillow.open(path) as opened:
                mode, image = opened.mode, opened.convert("RGB")
        except (OSError, SyntaxError, ValueError, Pillow.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        if mode.startswith(WIDE_MODES):  # Pillow makes white of all that is above 255
            raise ValueError(
                f"{path} has pixels of more than 8 bits (Pillow's mode {mode}); convert it to 8"
            )
        scale = image_size / min(image.size)
        size = tuple(max(image_size, round(side * scale)) for side in image.size)
        left, top = ((side - image_size) // 2 for side in size)
        image = image.resize(size, Pillow.Resampling.BILINEAR)
        yield (
            np.asarray(image.crop((left, top, left + image_size, top + image_size))),
            numbers[name],
        )
