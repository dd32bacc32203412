"""A tiny vision transformer for tests: its overrides of the parity recipe, and its images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

# Of recipes/parity.yaml: 8 x 8 digits in patches of 2, so 16 positions.
VISION = [
    "train.task=images",
    "vision.image_size=8",
    "vision.patch_size=2",
    "vision.num_channels=1",
    "vision.num_classes=10",
    "vision.crop_padding=1",
    "model.seq_length=16",
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.position_embedding_type=learned_absolute",
    "model.init_method_std=0.1",
]


def prepare_digits(folder: Path) -> Path:
    """The digits of the installed scikit-learn, prepared."""
    from vqmoe_megatron.data.prepare_images import prepare_images

    return prepare_images("digits", folder / "digits", []).path


def write_records(path: Path, labels: list[int], seed: int = 0) -> np.ndarray:
    """A file of CIFAR-10's binary version, byte by byte; its pixels uint8 [n, 3, 32, 32]."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 3, 32, 32), np.uint8)
    with path.open("wb") as stream:
        for label, image in zip(labels, pixels, strict=True):
            stream.write(bytes([label]))
            for colour in image:
                for row in colour:
                    stream.write(bytes(row.tolist()))
    return pixels


def cifar_folder(folder: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Two training files of ten images, and a test file of four."""
    folder.mkdir()
    first = write_records(folder / "data_batch_1.bin", list(range(10)), 1)
    second = write_records(folder / "data_batch_2.bin", list(range(9, -1, -1)), 2)
    test = write_records(folder / "test_batch.bin", [3, 1, 4, 1], 3)
    return folder, np.concatenate([first, second]), test
